"""A corpus: utterances from any number of manifests, opened lazily.

N utterances
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, final, overload

import numpy as np
from numpy.typing import NDArray

from manyvoice.data.cuts import CutSource, SharSource, is_cut, is_other_lhotse, shar_cuts
from manyvoice.data.hub import is_saved, open_hub
from manyvoice.data.lines import LineFile
from manyvoice.data.rows import parse_json
from manyvoice.data.sources import FolderSource, MemorySource, NemoSource, Source, TableSource
from manyvoice.data.stats import CorpusStats, measure
from manyvoice.data.utterance import ArrayAudio, Audio, BytesAudio, FileAudio, PartAudio, Utterance
from manyvoice.data.write import write_manifest
from manyvoice.errors import CorpusError

__all__ = [
    "ArrayAudio",
    "Audio",
    "BytesAudio",
    "Corpus",
    "CorpusStats",
    "FileAudio",
    "PartAudio",
    "Spec",
    "Utterance",
    "open_corpus",
]

Spec: TypeAlias = "str | Path | Corpus | Utterance | Sequence[str | Path | Corpus | Utterance]"


@final
class Corpus(Sequence[Utterance]):
    """Utterances in a fixed order, read when they are asked for; what is held is arrays.

    Safe to fork and to pickle. A malformed row raises CorpusError when it is read; `check` lists them all.
    """

    def __init__(self, sources: Sequence[Source], rows_N: NDArray[np.int64] | None = None):
        self._sources = tuple(sources)
        self._first = np.concatenate([[0], np.cumsum([len(s) for s in self._sources], dtype=np.int64)])
        self._rows_N = rows_N
        self._durations_N: NDArray[np.float64] | None = None
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return int(self._first[-1]) if self._rows_N is None else len(self._rows_N)

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> Corpus: ...
    def __getitem__(self, index: int | slice) -> Utterance | Corpus:
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"utterance {i} of a corpus of {len(self)}")
        i %= len(self)
        row = i if self._rows_N is None else int(self._rows_N[i])
        s = int(np.searchsorted(self._first, row, side="right")) - 1
        return self._sources[s].row(row - int(self._first[s]))

    def __iter__(self) -> Iterator[Utterance]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: Corpus) -> Corpus:
        rows_N = np.concatenate([self._all_rows(), other._all_rows() + self._first[-1]])
        return Corpus(self._sources + other._sources, rows_N)

    @property
    def durations_N(self) -> NDArray[np.float64]:
        """Seconds of every utterance; one pass over the rows, then remembered. Raises: CorpusError."""
        if self._durations_N is None:
            self._survey()
        assert self._durations_N is not None
        return self._durations_N

    @property
    def fingerprint(self) -> str:
        """SHA-256 over id, duration, text, speaker and label of all rows in order; the folder does not matter.

        Raises: CorpusError at a malformed row.
        """
        if self._fingerprint is None:
            self._survey()
        assert self._fingerprint is not None
        return self._fingerprint

    def texts(self) -> list[str]:
        """The text of every utterance, in order. Raises: CorpusError."""
        return [u.text for u in self]

    def speakers(self) -> list[str]:
        """The different speakers, sorted. Raises: CorpusError."""
        return sorted({u.speaker for u in self if u.speaker is not None})

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Corpus:
        """The utterances at these places, in this order. Raises: IndexError."""
        index_N = np.asarray(indices, dtype=np.int64)
        if index_N.ndim != 1 or (len(index_N) and not -len(self) <= index_N.min() <= index_N.max() < len(self)):
            raise IndexError(f"indices must be one row of places in a corpus of {len(self)}")
        chosen = Corpus(self._sources, self._all_rows()[index_N])
        if self._durations_N is not None:
            chosen._durations_N = self._durations_N[index_N]
        return chosen

    def where(self, predicate: Callable[[Utterance], bool]) -> Corpus:
        """The utterances for which ``predicate`` is true, in order. Raises: CorpusError."""
        return self.subset([i for i, utterance in enumerate(self) if predicate(utterance)])

    def split(self, by: str = "speaker", shares: Mapping[str, float] | None = None, seed: int = 0) -> dict[str, Corpus]:
        """Disjoint parts, by default 90 % train and 10 % dev, no speaker in two of them.

        Args: by: "speaker" or "utterance" (rows of one id stay together).  shares: of the hours; must add up to 1.
        Raises: CorpusError if an utterance has no speaker, or there are fewer speakers than parts.
        """
        return split_corpus(self, by, shares or {"train": 0.9, "dev": 0.1}, seed)

    def write(self, path: str | Path, *, overwrite: bool = False, audio_folder: str | Path | None = None) -> Corpus:
        """Write a NeMo manifest (JSON lines, relative audio paths) and open it; ids, order and fingerprint stay.

        Args: audio_folder: for sound that is in no file of its own (Shar, Hugging Face, memory).
        Raises: CorpusError if the file exists and ``overwrite`` is not set, or something cannot be written.
        """
        write_manifest(self, path, overwrite=overwrite, audio_folder=audio_folder)
        return open_corpus(path)

    def stats(self, encode: Callable[[str], Sequence[int]] | None = None) -> CorpusStats:
        """Hours, speakers, words, durations, tokens per second (characters without ``encode``). Raises: CorpusError."""
        return measure(self, encode)

    def describe(self) -> str:
        """`stats` in words."""
        return self.stats().text()

    def _survey(self) -> None:
        """Durations and fingerprint in one pass, since a large corpus is slow to read and a run wants both."""
        digest = hashlib.sha256(b"manyvoice corpus 1\n")
        durations_N = np.empty(len(self))
        for i, u in enumerate(self):
            durations_N[i] = u.duration
            digest.update(json.dumps([u.id, u.duration, u.text, u.speaker, u.label]).encode() + b"\n")
        durations_N.flags.writeable = False
        self._durations_N, self._fingerprint = durations_N, digest.hexdigest()

    def _all_rows(self) -> NDArray[np.int64]:
        return np.arange(len(self), dtype=np.int64) if self._rows_N is None else self._rows_N


def open_corpus(spec: Spec) -> Corpus:
    """Open a corpus; a list joins several, in order.

    A path may be a NeMo manifest (.jsonl, .json), a table with a header (.csv, .tsv), a lhotse cut manifest (.jsonl),
    each also .gz, a lhotse Shar folder, a folder that Hugging Face's save_to_disk wrote, or a folder of sound with
    text beside. ``hf:NAME[:config][:split]`` is a Hugging Face dataset. Manifests are indexed, rows are read on demand.

    Raises: CorpusError if there is no such thing, or it is none of these.
    """
    if isinstance(spec, Corpus):
        return spec
    if isinstance(spec, Utterance):
        return Corpus([MemorySource([spec])])
    if isinstance(spec, str | Path):
        return Corpus([_open_source(spec)])
    if spec and all(isinstance(part, Utterance) for part in spec):
        return Corpus([MemorySource([part for part in spec if isinstance(part, Utterance)])])
    joined = Corpus([])
    for part in spec:
        joined += open_corpus(part)
    return joined


def split_corpus(corpus: Corpus, by: str, shares: Mapping[str, float], seed: int) -> dict[str, Corpus]:
    """See `Corpus.split`. Groups come in the order of a hash of seed and name; each goes where most is missing."""
    if by not in ("speaker", "utterance"):
        raise CorpusError(f"by = {by!r}: must be 'speaker' or 'utterance'; choose one")
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1.0) > 1e-6:
        raise CorpusError(f"shares = {dict(shares)}: must be positive and add up to 1; correct them")
    groups: dict[str, list[int]] = {}
    for i, utterance in enumerate(corpus):
        name = utterance.speaker if by == "speaker" else utterance.id
        if name is None:
            raise CorpusError(f"{utterance.where}: speaker is missing: must be known to split; split by 'utterance'")
        groups.setdefault(name, []).append(i)
    if len(groups) < len(shares):
        raise CorpusError(f"{len(groups)} {by}s cannot fill the {len(shares)} parts {', '.join(shares)}; take fewer")
    order = sorted(groups, key=lambda name: (hashlib.sha256(f"{seed}:{name}".encode()).digest(), name))
    total = float(corpus.durations_N.sum())
    filled = dict.fromkeys(shares, 0.0)
    chosen: dict[str, list[int]] = {part: [] for part in shares}
    for left, name in zip(range(len(order), 0, -1), order, strict=True):
        empty = [part for part in shares if not chosen[part]]
        part = min(empty if left == len(empty) else shares, key=lambda p: filled[p] / (shares[p] * total))
        chosen[part] += groups[name]
        filled[part] += float(corpus.durations_N[groups[name]].sum())
    return {part: corpus.subset(sorted(indices)) for part, indices in chosen.items()}


def _open_source(spec: str | Path) -> Source:
    if isinstance(spec, str) and spec.startswith("hf:"):
        return open_hub(spec.removeprefix("hf:"))
    try:
        path = Path(spec)
        if path.is_dir():
            return _open_folder(path)
        found = path.is_file()
    except (OSError, ValueError) as error:
        raise CorpusError(f"{str(spec)!r}: cannot be reached: {error}; check the path and the permissions") from error
    if not found:
        raise CorpusError(f"{str(spec)!r}: no such file or folder; check the path (a dataset of the hub is hf:NAME)")
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    if kind in (".csv", ".tsv"):
        return TableSource(LineFile(spec, quoted=kind == ".csv"), tab=kind == ".tsv")
    if kind in (".jsonl", ".json", ".ndjson"):
        return _open_json_lines(LineFile(spec))
    raise CorpusError(
        f"{spec}: ends in {path.suffix!r}: must end in .jsonl, .json, .csv or .tsv, or one of these + .gz"
    )


def _open_json_lines(lines: LineFile) -> Source:
    """NeMo or lhotse, as the first row says; a damaged first row is left for whoever reads it."""
    try:
        row = parse_json(lines.line(0), lines.where(0)) if len(lines) else {}
    except CorpusError:
        return NemoSource(lines)
    if is_cut(row):
        return CutSource(lines)
    if is_other_lhotse(row):
        raise CorpusError(
            f"{lines.where(0)}: is a recording or supervision of lhotse; join the two to cuts first: lhotse cut simple"
        )
    return NemoSource(lines)


def _open_folder(folder: Path) -> Source:
    if shar_cuts(folder):
        return SharSource(folder)
    if is_saved(folder):
        return open_hub(str(folder))
    manifests = sorted(
        p.name for p in folder.iterdir() if p.name.removesuffix(".gz").endswith((".jsonl", ".csv", ".tsv"))
    )
    if manifests:
        raise CorpusError(f"{folder}: is a folder with the manifests {', '.join(manifests)}; name the one you mean")
    source = FolderSource(folder)
    if len(source) == 0:
        raise CorpusError(f"{folder}: holds no manifest and no sound; name a manifest or a folder of sound with texts")
    return source
