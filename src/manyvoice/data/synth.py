"""Corpora spoken by espeak-ng: many speakers, dialects and sentences, with noise, rooms and simulated atypical speech.

Equal specs give equal bytes with one espeak-ng version, one engine and one set of numeric libraries, whatever the
number of jobs; ``corpus.json`` names them all.

    N samples of audio
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from manyvoice.data.espeak import ENGINES, Engine, Line, open_engine
from manyvoice.data.grammar import GRAMMARS, Phrase, PhraseSource, read_sentences
from manyvoice.data.voices import DIALECTS, ENGLISH, Speaker, draw_speakers, language_of, script, speaker_split
from manyvoice.errors import Mistake, SynthesisError, UsageError, WorkError

HERTZ = 16_000
FORMATS = ("flac", "wav")
NOISES = ("white", "pink", "babble")
MANIFEST = "manifest.jsonl"
CORPUS = "corpus.json"
_CORPUS_FORMAT = "manyvoice.corpus.v1"
_TRAIL_S = 0.15  # silence after the last word: espeak-ng is asked for none, its own differs between voices
_RT60_S = (0.15, 0.7)  # bathrooms to large offices; Ko et al., ICASSP 2017, draw small and medium rooms alike
_DIRECT_TO_TAIL_DB = (0.0, 12.0)
_CHUNK = 32
_LICENCE = (
    "Synthetic speech made with eSpeak NG. The program and its voices are GPL-3.0-or-later and are not part of this"
    " corpus. Phrases of the digit and command grammars come with manyvoice and its licence; phrases of a text file"
    " keep the licence of that text."
)

Samples = NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class SynthSpec:
    """What a corpus holds.

    Args:
        utterances: how many.
        speakers: how many voices, drawn from the seed; dialects in turn.
        grammar: "digits", "commands" or "sentences" (then ``text`` is a file, one phrase a line).
        words: shortest and longest phrase, in words, or in characters for Chinese.
        vocabulary: with sentences: only phrases of the N most frequent words of the file.
        dialects: keys of ``manyvoice.data.voices.DIALECTS``.
        atypical: how many of the speakers are simulated atypical speakers.
        noise: probability of noise, of a signal-to-noise ratio uniform in ``snr_db`` (over the whole utterance).
        room: probability of a room.
        format: "flac" or "wav", both of 16 bits and 16 kHz.
        engine: "program", "library", or "auto": the program where it is installed.
    Raises: UsageError with every field that is out of range.
    """

    utterances: int
    speakers: int = 8
    grammar: str = "commands"
    text: Path | None = None
    words: tuple[int, int] = (1, 12)
    vocabulary: int | None = None
    dialects: tuple[str, ...] = tuple(ENGLISH)
    atypical: int = 0
    noise: float = 0.0
    snr_db: tuple[float, float] = (5.0, 20.0)
    room: float = 0.0
    seed: int = 0
    format: str = "flac"
    engine: str = "auto"

    def __post_init__(self) -> None:
        rules = (
            ("utterances", self.utterances >= 1, "at least one", "ask for 1 or more"),
            ("speakers", self.speakers >= 1, "at least one", "ask for 1 or more"),
            ("grammar", self.grammar in GRAMMARS, "unknown", f"use one of {', '.join(GRAMMARS)}"),
            ("text", (self.text is None) != (self.grammar == "sentences"), *_text_rule(self.grammar)),
            ("words", 1 <= self.words[0] <= self.words[1], "1 <= shortest <= longest", "as in (1, 12)"),
            ("vocabulary", _fits(self.vocabulary, self.grammar), "1 or more, with sentences only", "leave it out"),
            ("dialects", _known(self.dialects), "known and no two the same", f"use some of {', '.join(DIALECTS)}"),
            ("dialects", self.grammar != "sentences" or _readable(self.dialects), *_SENTENCES_RULE),
            ("atypical", 0 <= self.atypical <= self.speakers, f"0 to {self.speakers} speakers", "lower it"),
            ("noise", 0 <= self.noise <= 1, "a probability", "use 0 to 1"),
            ("snr_db", -30 <= self.snr_db[0] <= self.snr_db[1] <= 100, "lowest, highest", "as in (5, 20)"),
            ("room", 0 <= self.room <= 1, "a probability", "use 0 to 1"),
            ("format", self.format in FORMATS, "unknown", f"use one of {', '.join(FORMATS)}"),
            ("engine", self.engine in ENGINES, "unknown", f"use one of {', '.join(ENGINES)}"),
        )
        wrong = [Mistake(name, getattr(self, name), rule, way) for name, holds, rule, way in rules if not holds]
        if wrong:
            raise UsageError("; ".join(map(str, wrong)))


_SENTENCES_RULE = ("a text file is in one language, which espeak-ng reads", "English dialects, or cmn, or yue")


def _text_rule(grammar: str) -> tuple[str, str]:
    if grammar == "sentences":
        return "grammar 'sentences' needs a text file", "give one, one phrase a line"
    return f"grammar {grammar!r} takes no text file", "leave it out, or use grammar 'sentences'"


def _fits(vocabulary: int | None, grammar: str) -> bool:
    return vocabulary is None or (vocabulary >= 1 and grammar == "sentences")


def _known(dialects: Sequence[str]) -> bool:
    return 0 < len(dialects) == len(set(dialects)) and all(dialect in DIALECTS for dialect in dialects)


def _readable(dialects: Sequence[str]) -> bool:
    languages = {language_of(dialect) for dialect in dialects if dialect in DIALECTS}
    return len(languages) <= 1 and "hak" not in languages


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One utterance to come."""

    index: int
    speaker: Speaker
    phrase: Phrase

    @property
    def id(self) -> str:
        return f"{self.speaker.name}-{self.index:06d}"


def synthesise(
    spec: SynthSpec, out: Path, *, jobs: int = 1, overwrite: bool = False, progress: Progress | None = None
) -> Path:
    """Speak a corpus into the folder ``out``; return its manifest.

    With ``jobs`` above 1, the calling script needs the usual ``if __name__ == "__main__":``, as for any process pool.

    Args: jobs: processes.  overwrite: replace a corpus that is there.  progress: called with (done, all).
    Raises: UsageError if ``out`` exists and may not be replaced, or no phrase fits; WorkError if it cannot be made;
        SynthesisError if espeak-ng fails.
    """
    with _Aside(out, overwrite) as folder, _Speech(spec, jobs) as speech:
        speakers = draw_speakers(spec.speakers, spec.dialects, seed=spec.seed, atypical=spec.atypical)
        tasks = _plan(spec, speakers, spec.utterances, (0.0, 1.0))
        speech.write(tasks, folder, functools.partial(_report, progress, 0, spec.utterances))
    return out / MANIFEST


def synthesise_splits(
    spec: SynthSpec,
    out: Path,
    splits: Mapping[str, float],
    *,
    held_out_speakers: bool = False,
    jobs: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Speak one corpus in several folders, ``out/train`` and so on, that share no phrase; return their manifests.

    Args: splits: name -> share of the utterances and phrases; shares sum to 1.  held_out_speakers: the splits share no
        speaker either; atypical speakers are dealt out in proportion like the others.
    Raises: as ``synthesise``; UsageError if shares do not sum to 1 or a split would have no utterance or no speaker.
    """
    counts = _share_out(spec, splits)
    speakers = draw_speakers(spec.speakers, spec.dialects, seed=spec.seed, atypical=spec.atypical)
    groups = speaker_split(speakers, splits, spec.seed) if held_out_speakers else dict.fromkeys(splits, speakers)
    paths = {}
    low, done = 0.0, 0
    with _Aside(out, overwrite) as folder, _Speech(spec, jobs) as speech:
        for i, (name, share) in enumerate(splits.items()):
            high = 1.0 if i == len(splits) - 1 else low + share
            tasks = _plan(spec, groups[name], counts[name], (low, high), first=done)
            notes = {"split": name, "phrases": [low, high], "held_out_speakers": held_out_speakers}
            speech.write(tasks, folder / name, functools.partial(_report, progress, done, spec.utterances), notes)
            paths[name] = out / name / MANIFEST
            low, done = high, done + counts[name]
        summary = {"format": _CORPUS_FORMAT, "splits": counts, "seed": spec.seed}
        _write_json(folder / CORPUS, summary)
    return paths


def _share_out(spec: SynthSpec, splits: Mapping[str, float]) -> dict[str, int]:
    total = sum(splits.values())
    if not splits or abs(total - 1) > 1e-6 or min(splits.values()) <= 0:
        raise UsageError(f"splits = {dict(splits)}: shares must be above 0 and sum to 1, but sum to {total:g}")
    if any(Path(name).name != name for name in splits):
        raise UsageError(f"splits = {dict(splits)}: names become folders; use plain names such as train, dev, test")
    ends = [round(spec.utterances * end) for end in itertools.accumulate(splits.values())]
    ends[-1] = spec.utterances
    counts = {name: end - start for name, start, end in zip(splits, [0, *ends], ends, strict=False)}
    empty = [name for name, count in counts.items() if count < 1]
    if empty:
        raise UsageError(f"utterances = {spec.utterances}: nothing is left for {', '.join(empty)}; ask for more")
    return counts


def _plan(
    spec: SynthSpec, speakers: Sequence[Speaker], count: int, part: tuple[float, float], first: int = 0
) -> list[_Task]:
    streams: dict[str, Iterator[Phrase]] = {}
    for language in dict.fromkeys(speaker.language for speaker in speakers):
        lines = read_sentences(spec.text, language, spec.words, spec.vocabulary) if spec.text is not None else []
        source = PhraseSource(
            grammar=spec.grammar, language=language, words=spec.words, sentences=lines, part=part, seed=spec.seed
        )
        streams[language] = source.stream(random.Random(f"{spec.seed}/phrases/{language}/{part}"))
    turns = itertools.islice(itertools.cycle(speakers), count)
    return [
        _Task(index=first + i, speaker=speaker, phrase=next(streams[speaker.language]))
        for i, speaker in enumerate(turns)
    ]


def _report(progress: Progress | None, before: int, total: int, done: int) -> None:
    if progress is not None:
        progress(before + done, total)


class _Aside:
    """A folder beside ``out``, renamed to it at the end; if the block fails, ``out`` stays as it was."""

    def __init__(self, out: Path, overwrite: bool):
        self._out = out
        if out.exists() and not out.is_dir():
            raise UsageError(f"out = {str(out)!r}: is a file; name a folder")
        if out.is_dir() and any(out.iterdir()):
            if not (out / CORPUS).is_file():
                raise UsageError(f"out = {str(out)!r}: holds files that are no corpus; name another or an empty folder")
            if not overwrite:
                raise UsageError(
                    f"out = {str(out)!r}: holds a complete corpus; use it, or replace it with --overwrite, which in "
                    "Python is overwrite=True"
                )
        self._folder = out.parent / f".{out.name}.partial"

    def __enter__(self) -> Path:
        shutil.rmtree(self._folder, ignore_errors=True)  # what a killed run left
        try:
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise WorkError(f"out = {str(self._out)!r}: cannot be made ({error}); name another folder") from error
        return self._folder

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        old = self._out.parent / f".{self._out.name}.replaced"
        shutil.rmtree(old, ignore_errors=True)
        if self._out.exists():
            self._out.rename(old)
        self._folder.rename(self._out)
        shutil.rmtree(old, ignore_errors=True)


class _Speech:
    """The engine, in this process or in a pool."""

    def __init__(self, spec: SynthSpec, jobs: int):
        if jobs < 1:
            raise UsageError(f"jobs = {jobs}: at least one process; use 1 or more")
        self._spec, self._jobs = spec, jobs

    def __enter__(self) -> _Speech:
        self._engine = open_engine(self._spec.engine)
        self._pool: ProcessPoolExecutor | None = None
        if self._jobs > 1:
            # spawn: forking a process that has threads (torch, progress bars) may hang
            self._pool = ProcessPoolExecutor(
                self._jobs, multiprocessing.get_context("spawn"), _open_in_worker, (self._engine.kind,)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._engine.close()

    def write(
        self,
        tasks: Sequence[_Task],
        folder: Path,
        report: Callable[[int], None],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Speak the tasks into ``folder``, with ``manifest.jsonl`` and ``corpus.json``."""
        speakers = list(dict.fromkeys(task.speaker for task in tasks))
        for speaker in speakers:
            self._engine.require(speaker.voice)
            (folder / speaker.name).mkdir(parents=True)
        rows = []
        for chunk in self._spoken(tasks, folder):
            rows += chunk
            report(len(rows))
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        _write_json(folder / CORPUS, {**self._describe(rows, speakers), **(notes or {})})

    def _spoken(self, tasks: Sequence[_Task], folder: Path) -> Iterable[list[dict[str, Any]]]:
        if self._pool is None:
            return ([_speak(task, self._spec, folder, self._engine)] for task in tasks)
        chunks = [tasks[i : i + _CHUNK] for i in range(0, len(tasks), _CHUNK)]
        return self._pooled(chunks, folder)

    def _pooled(self, chunks: Sequence[Sequence[_Task]], folder: Path) -> Iterator[list[dict[str, Any]]]:
        assert self._pool is not None
        try:
            yield from self._pool.map(functools.partial(_speak_in_worker, self._spec, folder), chunks)
        except BrokenProcessPool as error:
            raise SynthesisError(
                f"jobs = {self._jobs}: a worker process ended early ({error}); a script that asks for several jobs must"
                ' do so under `if __name__ == "__main__":`; otherwise try jobs=1'
            ) from error

    def _describe(self, rows: Sequence[Mapping[str, Any]], speakers: Sequence[Speaker]) -> dict[str, Any]:
        spec = asdict(self._spec)
        if self._spec.text is not None:
            digest = hashlib.sha256(self._spec.text.read_bytes()).hexdigest()
            spec["text"] = {"name": self._spec.text.name, "sha256": digest}
        libraries = {name: version(name) for name in ("numpy", "soundfile", "soxr")}
        return {
            "format": _CORPUS_FORMAT,
            "seed": self._spec.seed,
            "utterances": len(rows),
            "seconds": round(math.fsum(row["duration"] for row in rows), 6),
            "engine": {"name": "espeak-ng", "kind": self._engine.kind, "version": self._engine.version},
            "libraries": {**libraries, "libsndfile": soundfile.__libsndfile_version__},
            "spec": spec,
            "speakers": [speaker.describe() for speaker in speakers],
            "licence": _LICENCE,
        }


_worker_engine: Engine | None = None


def _open_in_worker(kind: str) -> None:
    global _worker_engine
    _worker_engine = open_engine(kind)


def _speak_in_worker(spec: SynthSpec, folder: Path, tasks: Sequence[_Task]) -> list[dict[str, Any]]:
    assert _worker_engine is not None
    return [_speak(task, spec, folder, _worker_engine) for task in tasks]


def _speak(task: _Task, spec: SynthSpec, folder: Path, engine: Engine) -> dict[str, Any]:
    """Write one sound file; return its manifest row."""
    speaker, text = task.speaker, task.phrase.text
    rng = random.Random(f"{spec.seed}/utterance/{task.index}")
    phonemes = task.phrase.phonemes
    if phonemes is None and speaker.atypical is not None:
        phonemes = engine.phonemes(speaker.voice, text)
    ssml = script(speaker, text, phonemes, rng)
    spoken, hertz = engine.speak(Line(voice=speaker.voice, ssml=ssml, pitch=speaker.pitch, rate=speaker.rate))
    audio_N = soxr.resample(spoken.astype(np.float64) / 2**15, hertz, HERTZ)
    audio_N = np.concatenate([audio_N, np.zeros(round(_TRAIL_S * HERTZ))])
    audio_N, heard = _surround(audio_N, spec, rng)
    name = f"{speaker.name}/{task.id}.{spec.format}"
    pcm_N = np.round(audio_N * (2**15 - 1)).astype(np.int16)
    soundfile.write(folder / name, pcm_N, HERTZ, format=spec.format.upper(), subtype="PCM_16")
    row = {"audio_filepath": name, "duration": round(len(pcm_N) / HERTZ, 6), "text": text, "speaker": speaker.name}
    row |= {"id": task.id, "language": speaker.language, "dialect": speaker.dialect, "voice": speaker.voice, **heard}
    if speaker.atypical is not None:
        row |= {"simulated": True, "atypical": asdict(speaker.atypical) | {"rate": speaker.rate}}
    return row


def _surround(audio_N: Samples, spec: SynthSpec, rng: random.Random) -> tuple[Samples, dict[str, Any]]:
    """Room, then noise, as often as the spec says; scaled down if it would clip."""
    heard: dict[str, Any] = {}
    generator = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
    if rng.random() < spec.room:
        rt60, ratio_db = round(rng.uniform(*_RT60_S), 3), round(rng.uniform(*_DIRECT_TO_TAIL_DB), 2)
        audio_N = reverberate(audio_N, rt60, ratio_db, generator)
        heard["room"] = {"rt60_s": rt60, "direct_to_tail_db": ratio_db}
    if rng.random() < spec.noise:
        kind, snr_db = rng.choice(NOISES), round(rng.uniform(*spec.snr_db), 2)
        audio_N = add_noise(audio_N, kind, snr_db, generator)
        heard |= {"noise": kind, "noise_snr_db": snr_db}
    return audio_N / max(1.0, float(np.abs(audio_N).max()) / 0.99), heard


def reverberate(audio_N: Samples, rt60: float, ratio_db: float, generator: np.random.Generator) -> Samples:
    """Convolve with a direct path and a tail of noise that decays by 60 dB in ``rt60`` seconds; the length stays.

    Args: ratio_db: energy of the direct path over that of the tail.
    """
    t = np.arange(1, round(rt60 * HERTZ)) / HERTZ
    tail = generator.standard_normal(len(t)) * 10 ** (-3 * t / rt60)
    tail[t < 0.0025] = 0.0  # the first reflection travels about a metre further than the direct path
    tail *= math.sqrt(10 ** (-ratio_db / 10) / float(np.sum(tail**2)))
    response = np.concatenate([[1.0], tail])
    size = 1 << (len(audio_N) + len(response)).bit_length()
    return np.fft.irfft(np.fft.rfft(audio_N, size) * np.fft.rfft(response, size), size)[: len(audio_N)]


def add_noise(audio_N: Samples, kind: str, snr_db: float, generator: np.random.Generator) -> Samples:
    """Add noise of a kind in ``NOISES``: energy of the audio over energy of the noise is ``snr_db``."""
    noise_N = _noise(kind, len(audio_N), generator)
    gain = math.sqrt(float(np.sum(audio_N**2)) / float(np.sum(noise_N**2)) / 10 ** (snr_db / 10))
    return audio_N + gain * noise_N


def _noise(kind: str, count: int, generator: np.random.Generator) -> Samples:
    if kind == "white":
        return generator.standard_normal(count)
    if kind == "pink":
        return _shaped(count, generator, lambda hertz: 1 / np.sqrt(np.maximum(hertz, 20)))
    # Babble-like: eight streams of noise with the slope of speech (flat to 500 Hz, then -9 dB an octave), each swelling
    # at the rate of syllables, about four a second.
    babble = np.zeros(count)
    for _ in range(8):
        talker = _shaped(
            count, generator, lambda hertz: (hertz > 80) * np.minimum(1, (500 / np.maximum(hertz, 1)) ** 1.5)
        )
        swell = _shaped(count, generator, lambda hertz: (hertz > 1) & (hertz < 6))
        babble += talker * np.maximum(0, 1 + swell / max(1e-9, float(swell.std())))
    return babble


def _shaped(count: int, generator: np.random.Generator, gain: Callable[[Samples], NDArray[Any]]) -> Samples:
    size = max(HERTZ, 1 << count.bit_length())
    spectrum = np.fft.rfft(generator.standard_normal(size)) * gain(np.fft.rfftfreq(size, 1 / HERTZ).astype(np.float64))
    return np.fft.irfft(spectrum, size)[:count]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
