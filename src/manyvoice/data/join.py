"""Strings made by joining clips of one speaker: connected speech where a corpus has only isolated words.

N samples
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import numpy as np
from numpy.random import Generator

from manyvoice.data.audio import Samples, write_audio
from manyvoice.data.manifest import Spec, open_corpus
from manyvoice.data.utterance import Utterance
from manyvoice.errors import CorpusError
from manyvoice.types import Seconds

Groups = Mapping[str, Sequence[Utterance]]
FLOOR_FRAME = Seconds(0.01)
FLOOR_QUANTILE = 0.05  # the quietest frames of a clip that is cut close are few


def join_clips(
    rows: Spec,
    out: Path,
    *,
    strings: int,
    clips: int | tuple[int, int],
    gap: tuple[Seconds, Seconds] = (Seconds(0.0), Seconds(0.15)),
    seed: int = 0,
    by: str = "speaker",
    balance: Literal["speaker", "clip"] = "speaker",
) -> Path:
    """Write ``strings`` joined utterances as 16-bit FLAC below ``out``, with ``out/manifest.jsonl``.

    The samples of a clip are not changed; each gap is uniform in ``gap`` and holds white noise at the noise floor of
    the clips beside it (digital silence beside digitally silent clips). Zeros would do worse: after a logarithm they
    lie far below everything that a microphone gives, and a model learns to read them as "here is a join".

    A manifest's row has ``id``, ``audio_filepath``, ``duration``, ``text`` (the texts joined by spaces), ``speaker``,
    ``clips`` (the ids, so that intervals can be resampled by clip) and what all clips of the string agree on.
    String i follows from (seed, i) and the rows alone: more strings continue the same list.

    Args:
        rows: a manifest or what else `open_corpus` takes; every clip needs text and a value of ``by``.
        clips: how many to a string, or an inclusive range. A string has no clip twice.
        by: "speaker", "label", "language" or another column: the clips of a string agree on it.
        balance: "speaker" gives every speaker as many strings (one more or less), "clip" gives each as many strings as
            its share of the clips.
    Returns: the manifest.
    Raises: CorpusError if ``out`` exists or cannot be made, a number makes no sense, or the rows cannot give such
        strings; nothing is written then. AudioError if a clip cannot be read.
    """
    fewest, most = (clips, clips) if isinstance(clips, int) else clips
    _check_numbers(strings, fewest, most, gap, balance)
    if out.exists():
        raise CorpusError(f"{out} is there already; choose another folder or remove it")
    groups = _grouped(open_corpus(rows), by, most)
    order = sorted(groups)
    shuffled = [order[k] for k in _generator(seed, "order").permutation(len(order))]
    aside = _beside(out)
    try:
        (aside / "audio").mkdir()
        with (aside / "manifest.jsonl").open("w", encoding="utf-8") as manifest:
            for i in range(strings):
                gen = _generator(seed, f"string {i}")
                group = groups[shuffled[i % len(shuffled)] if balance == "speaker" else _drawn(order, groups, gen)]
                chosen = [group[k] for k in gen.choice(len(group), size=gen.integers(fewest, most + 1), replace=False)]
                # The highest, so that no clip loses what it has.
                rate = max(row.audio.info().rate for row in chosen)
                samples_N = _joined([row.audio.read(rate) for row in chosen], rate, gap, gen)
                write_audio(aside / "audio" / f"{i:06d}.flac", samples_N, rate)
                row = _manifest_row(f"{out.name}-{i:06d}", f"audio/{i:06d}.flac", len(samples_N) / rate, chosen)
                manifest.write(json.dumps(row, ensure_ascii=False) + "\n")
        aside.chmod(0o755)  # temporary folders are born private
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out / "manifest.jsonl"


def _beside(out: Path) -> Path:
    """A new folder on the same disk, to be renamed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise CorpusError(f"{out}: cannot be made ({error}); choose another folder") from error


def _check_numbers(strings: int, fewest: int, most: int, gap: tuple[Seconds, Seconds], balance: str) -> None:
    if strings < 1:
        raise CorpusError(f"strings must be 1 or more, but is {strings}; ask for some")
    if not 1 <= fewest <= most:
        raise CorpusError(f"clips must be 1 or more, or a range (fewest, most), but is {(fewest, most)}; try (3, 6)")
    if not 0 <= gap[0] <= gap[1] < 3600:
        raise CorpusError(f"gap must be a range (shortest, longest) in seconds, but is {gap}; try (0.0, 0.15)")
    if balance not in ("speaker", "clip"):
        raise CorpusError(f"balance must be 'speaker' or 'clip', but is {balance!r}; give one of the two")


def _grouped(rows: Sequence[Utterance], by: str, most: int) -> Groups:
    groups: dict[str, list[Utterance]] = defaultdict(list)
    seen: set[str] = set()
    for row in rows:
        value = getattr(row, by) if by in ("speaker", "label", "language") else row.extra.get(by)
        if value is None:
            raise CorpusError(
                f"{row.where}: {row.id} has no {by}, by which clips are joined; add it, or join by another"
            )
        if not row.text.strip():
            raise CorpusError(f"{row.where}: {row.id} has no text to join; transcribe it or leave the row out")
        if row.id in seen:
            raise CorpusError(f"{row.where}: {row.id} is there twice; ids tell clips apart: give each row its own")
        seen.add(row.id)
        groups[str(value)].append(row)
    if not groups:
        raise CorpusError("there are no clips to join; give a corpus with rows in it")
    # Sorted, so that the order of the manifest's lines does not change what is drawn.
    groups = {value: sorted(group, key=lambda row: row.id) for value, group in groups.items()}
    small = sorted(value for value, group in groups.items() if len(group) < most)
    if small:
        raise CorpusError(
            f"{by} {small[0]} has {len(groups[small[0]])} clips, {most} are asked for ({len(small)} such of "
            f"{len(groups)}): a string has no clip twice; ask for fewer clips or leave out those rows"
        )
    return groups


def _generator(seed: int, purpose: str) -> Generator:
    digest = blake2b(f"{seed}:{purpose}".encode(), digest_size=16, person=b"join.v1").digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _drawn(order: Sequence[str], groups: Groups, gen: Generator) -> str:
    sizes = np.array([len(groups[value]) for value in order], dtype=np.float64)
    return order[int(gen.choice(len(order), p=sizes / sizes.sum()))]


def _joined(clips: Sequence[Samples], rate: int, gap: tuple[Seconds, Seconds], gen: Generator) -> Samples:
    floors = [noise_floor(clip_N, rate) for clip_N in clips]
    parts = [clips[0]]
    for k, clip_N in enumerate(clips[1:], start=1):
        samples = round(gen.uniform(*gap) * rate)
        level = (floors[k - 1] + floors[k]) / 2
        parts += [(level * gen.standard_normal(samples)).astype(np.float32), clip_N]
    return np.concatenate(parts)


def noise_floor(samples_N: Samples, rate: int) -> float:
    """RMS of the quiet frames: the 5 % quantile over frames of 10 ms; of everything where there is not one frame."""
    width = max(1, round(FLOOR_FRAME * rate))
    frames = len(samples_N) // width
    framed = samples_N[: frames * width].reshape(frames, width) if frames else samples_N[None, :]
    return float(np.quantile(np.sqrt(np.mean(np.square(framed, dtype=np.float64), axis=1)), FLOOR_QUANTILE))


def _manifest_row(id: str, audio: str, duration: float, chosen: Sequence[Utterance]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": id, "audio_filepath": audio, "duration": round(duration, 4)}
    row["text"] = " ".join(clip.text.strip() for clip in chosen)
    facts = [{"speaker": clip.speaker, "label": clip.label, "language": clip.language, **clip.extra} for clip in chosen]
    shared = {key: value for key, value in facts[0].items() if all(other.get(key) == value for other in facts)}
    row |= {key: value for key, value in shared.items() if value is not None and key not in row}
    return {**row, "clips": [clip.id for clip in chosen]}
