"""Sound to text: files, folders or manifests to text, JSON lines, SRT or VTT.

T  encoder frames   V  vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO, final

import numpy as np
from torch import Tensor

from manyvoice.data.audio import read_audio
from manyvoice.data.manifest import open_corpus
from manyvoice.data.pauses import cut_at_pauses
from manyvoice.decode.align import Word, align, words
from manyvoice.decode.beam import BeamDecoder, BeamOptions
from manyvoice.decode.greedy import greedy
from manyvoice.decode.lm import NGram
from manyvoice.decode.recogniser import Recogniser
from manyvoice.decode.subtitles import segments, to_srt, to_vtt
from manyvoice.errors import AudioError, UsageError, VoiceError, WorkError
from manyvoice.types import Padded, Seconds

Form = Literal["text", "jsonl", "srt", "vtt"]
ENDINGS: dict[Form, str] = {"text": ".txt", "jsonl": ".jsonl", "srt": ".srt", "vtt": ".vtt"}
_SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".caf", ".w64", ".m4a"}
_MANIFESTS = {".jsonl", ".json", ".csv", ".tsv", ".gz"}
# Beside the transcripts of a folder: which weights made them.
RECEIPT = "receipt.json"
# How each line of an output begins; whatever begins otherwise is somebody else's file.
_START = b'{"id": '
# Feature normalisation wants more than a blink; shorter pieces hold no word.
_SHORTEST = Seconds(0.1)
# Nats for a hotword without a number of its own: about what e**5 = 150 to one in its favour is worth.
HOTWORD_BONUS = 5.0


@final
@dataclass(frozen=True, kw_only=True)
class Transcript:
    """One recording's text, and words with times in seconds and confidences in 0..1.

    Args: receipt: which weights answered; None if nobody asked, or nothing ran on a sound too short to hold a word.
    """

    id: str
    text: str
    words: tuple[Word, ...]
    seconds: Seconds
    receipt: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As a JSON line."""
        spoken = [
            {"word": w.text, "start": round(w.start, 3), "end": round(w.end, 3), "confidence": round(w.confidence, 4)}
            for w in self.words
        ]
        receipt = None if self.receipt is None else dict(self.receipt)
        return {
            "id": self.id, "text": self.text, "seconds": round(self.seconds, 3), "words": spoken, "receipt": receipt
        }  # fmt: skip

    def render(self, form: Form) -> str:
        """The whole file that holds this transcript alone."""
        if form == "text":
            return self.text + "\n"
        if form == "jsonl":
            return json.dumps(self.as_dict(), ensure_ascii=False) + "\n"
        return (to_srt if form == "srt" else to_vtt)(segments(self.words, length=self.seconds))


@final
@dataclass(frozen=True)
class Recording:
    """Something to transcribe: a name, and how its samples are read at a rate."""

    id: str
    read: Callable[[int], np.ndarray]


def recordings_of(sources: Sequence[str | Path]) -> Iterator[Recording]:
    """Files, folders of sound files (sub-folders too) and manifests, in the order given.

    Raises: UsageError for a path that is none of these, or a folder without sound.
    """
    for source in map(Path, sources):
        if source.is_dir():
            files = sorted(p for p in source.rglob("*") if p.suffix.lower() in _SOUNDS)
            if not files:
                raise UsageError(
                    f"{source}: no sound files in this folder; known endings: {', '.join(sorted(_SOUNDS))}"
                )
            for path in files:
                yield _of_file(path)
        elif source.suffix.lower() in _MANIFESTS and source.is_file():
            for utterance in open_corpus(source):
                yield Recording(utterance.id, utterance.audio.read)
        elif source.is_file():
            yield _of_file(source)
        else:
            raise UsageError(f"{source}: no such file or folder; give sound files, folders of them, or a manifest")


def _of_file(path: Path) -> Recording:
    return Recording(str(path), lambda rate: read_audio(path, rate=rate))


def transcribe_all(
    recogniser: Recogniser,
    recordings: Iterable[Recording],
    *,
    longest: Seconds = Seconds(30.0),
    beam: BeamDecoder | None = None,
    on_error: Callable[[Recording, AudioError], None] | None = None,
) -> Iterator[Transcript]:
    """Transcripts in order; recordings longer than ``longest`` are cut at pauses.

    Args: beam: search wider than greedily.  on_error: told of a sound that cannot be read, which is then left out;
        without it the AudioError is raised.
    """
    for recording in recordings:
        try:
            samples_N = recording.read(recogniser.log_mel.rate)
            yield transcribe_samples(recogniser, samples_N, name=recording.id, longest=longest, beam=beam)
        except AudioError as error:
            if on_error is None:
                raise
            on_error(recording, error)


def transcribe_samples(
    recogniser: Recogniser,
    samples_N: np.ndarray,
    *,
    name: str = "",
    longest: Seconds = Seconds(30.0),
    beam: BeamDecoder | None = None,
) -> Transcript:
    """One recording at the model's rate."""
    rate = recogniser.log_mel.rate
    spoken: list[Word] = []
    texts: list[str] = []
    for start, stop in cut_at_pauses(samples_N, rate, longest):
        if stop - start < _SHORTEST * rate:
            continue
        logp = recogniser.logp_of([samples_N[start:stop]])
        tokens = _tokens(recogniser, logp, beam)
        if not tokens:
            continue
        texts.append(recogniser.tokenizer.decode(tokens))
        logp_TV = logp.x[0, : int(logp.len_B[0])]
        spoken += [_later(word, start / rate) for word in _words(recogniser, logp_TV, tokens)]
    seconds = Seconds(len(samples_N) / rate)
    return Transcript(id=name, text=" ".join(t for t in texts if t), words=tuple(spoken), seconds=seconds)


def _tokens(recogniser: Recogniser, logp: Padded, beam: BeamDecoder | None) -> list[int]:
    if beam is not None:
        return list(beam.decode(logp.x, logp.len_B)[0][0].tokens)
    return greedy(logp.x, logp.len_B, recogniser.family.blank(recogniser.model))[0]


def _words(recogniser: Recogniser, logp_TV: Tensor, tokens: Sequence[int]) -> list[Word]:
    tokenizer = recogniser.tokenizer
    alignment = align(logp_TV, tokens, recogniser.family.blank(recogniser.model))
    return words(alignment, tokenizer.strings, tokenizer.boundary, recogniser.shift)


def _later(word: Word, offset: float) -> Word:
    return replace(word, start=Seconds(word.start + offset), end=Seconds(word.end + offset))


def transcribe(
    model: Recogniser | str | Path, *sources: str | Path | np.ndarray, rate: int | None = None
) -> list[Transcript]:
    """Transcripts of files, folders, manifests, or arrays of samples.

    Args: model: a recogniser, a folder, or a hub id.  rate: of arrays; they must be at the model's rate.
    """
    recogniser = model if isinstance(model, Recogniser) else Recogniser.load(model)
    wanted = recogniser.log_mel.rate
    found: list[Transcript] = []
    for number, source in enumerate(sources):
        if isinstance(source, np.ndarray):
            if rate not in (None, wanted):
                raise UsageError(f"rate = {rate}: the model hears {wanted} samples a second; resample first")
            found.append(transcribe_samples(recogniser, source.astype(np.float32), name=f"array-{number}"))
        else:
            found += transcribe_all(recogniser, recordings_of([source]))
    return found


def build_beam(
    recogniser: Recogniser,
    *,
    beam: int = 16,
    lm: Path | None = None,
    lm_weight: float = 0.5,
    hotwords: Sequence[str] = (),
) -> BeamDecoder:
    """A prefix beam search for this recogniser, with an ARPA model and hotwords given as ``text`` or ``text=bonus``."""
    bonuses = dict(_hotword(h) for h in hotwords)
    options = BeamOptions(beam=max(beam, 2), lm_weight=lm_weight, hotwords=bonuses)
    tokenizer = recogniser.tokenizer
    model = NGram.read_arpa(lm) if lm is not None else None
    return BeamDecoder(tokenizer.strings, tokenizer.blank, model, options, word_boundary=tokenizer.boundary)


def _hotword(spec: str) -> tuple[str, float]:
    text, equals, bonus = spec.rpartition("=")
    if not equals:
        return spec, HOTWORD_BONUS
    try:
        return text, float(bonus)
    except ValueError as error:
        raise UsageError(f"--hotword {spec!r}: the bonus after = must be a number, as in manyvoice=5") from error


def form_named(name: str) -> Form:
    """The output form of that name; UsageError lists them."""
    for form in ENDINGS:
        if form == name:
            return form
    raise UsageError(f"--format = {name!r}: must be one of {', '.join(ENDINGS)}")


def output_of(recording: str, folder: Path, form: Form) -> Path:
    """The file of one recording in an output folder; path separators become underscores."""
    stem = recording.strip("/").replace("/", "_").replace("\\", "_")
    return folder / (stem + ENDINGS[form])


@final
@dataclass(frozen=True, kw_only=True)
class Weights:
    """Which weights make a transcript; equal weights hear the same.

    Args: base: fingerprint of the base.  size: None for the whole model.  hash: of the voice; None for the bare base.
        voice: what it is called, for people only.
    """

    base: str
    size: str | None
    hash: str | None
    voice: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, receipt: Any) -> Weights:
        """Those that a receipt names. KeyError or TypeError if it is no receipt."""
        found = {name: receipt[name] for name in ("base", "size", "hash", "voice")}
        if not isinstance(found["base"], str) or not all(isinstance(v, str | None) for v in found.values()):
            raise TypeError(f"{found} are no names of weights")
        return cls(**found)

    def __str__(self) -> str:
        size = "the whole model" if self.size is None else f"size {self.size}"
        voice = "no voice" if self.hash is None else f"the voice {self.voice} ({self.hash[:12]})"
        return f"base {self.base[:12]}, {size}, {voice}"


@final
@dataclass(frozen=True, kw_only=True)
class Output:
    """Where transcripts of one set of weights are kept: in a .jsonl file, or in a folder, one file a recording.

    Raises: UsageError if the form does not fit into a .jsonl file.
    """

    path: Path
    form: Form
    weights: Weights

    def __post_init__(self) -> None:
        if self._is_one_file and self.form not in ("jsonl", "text"):
            raise UsageError(
                f"--output {self.path}: {self.form} wants a folder, one file a recording; give one without an ending"
            )

    @property
    def _is_one_file(self) -> bool:
        return self.path.suffix == ".jsonl"

    def pending(self, recordings: Iterable[Recording]) -> Iterator[Recording]:
        """Those that an interrupted run has not written yet.

        Raises: UsageError if other weights wrote what is there, or two recordings would be one in the output.
        """
        done = self._ids() if self._is_one_file else self._claimed()
        named: dict[str, str] = {}
        for recording in recordings:
            name = recording.id if self._is_one_file else self._file_of(recording.id).name
            if name in named:
                raise UsageError(
                    f"--output {self.path}: {named[name]} and {recording.id} are both {name} there, and one of them "
                    "would be lost; give each source an --output of its own"
                )
            named[name] = recording.id
            there = recording.id in done or not self._is_one_file and self._file_of(recording.id).exists()
            if not there:
                yield recording

    def store(self, transcript: Transcript) -> None:
        """Write one. VoiceError if other weights made it, because the voice was replaced while others were written."""
        if transcript.receipt is not None and (made := Weights.of(transcript.receipt)) != self.weights:
            raise VoiceError(
                f"{transcript.id}: was made with {made}, but {self.path} holds what {self.weights} made: the voice was "
                "replaced meanwhile; run it again with another --output"
            )
        if self._is_one_file:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(transcript.render("jsonl"))
            return
        _write(self._file_of(transcript.id), transcript.render(self.form))

    def _file_of(self, recording: str) -> Path:
        return output_of(recording, self.path, self.form)

    def _ids(self) -> set[str]:
        """Of the transcripts in the file; a last line that was cut off is dropped from it."""
        data = self.path.read_bytes() if self.path.exists() else b""
        # not splitlines: the strings of JSON may hold other ends of lines
        *lines, cut = data.split(b"\n")
        ids = {self._id_of(line, number) for number, line in enumerate(lines, start=1)}
        if cut and not cut.startswith(_START) and not _START.startswith(cut):
            raise self._refusal(len(lines) + 1, "is no transcript")
        if cut:
            with self.path.open("r+b") as file:
                file.truncate(len(data) - len(cut))
        return ids

    def _id_of(self, line: bytes, number: int) -> str:
        try:
            row = json.loads(line)
            # nothing ran on a sound without a word's length, with these weights as with any
            nothing = row["receipt"] is None and not row["text"]
            made, name = None if nothing else Weights.of(row["receipt"]), str(row["id"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._refusal(number, "has no receipt, so nobody knows which weights made it") from error
        if made is not None and made != self.weights:
            raise self._refusal(number, f"was made with {made}")
        return name

    def _claimed(self) -> set[str]:
        """Note whose words the folder holds, unless it says so already; nothing is known by its id."""
        self.path.mkdir(parents=True, exist_ok=True)
        note = self.path / RECEIPT
        some = next((p.name for p in sorted(self.path.iterdir()) if p.suffix in ENDINGS.values()), None)
        if some is None:
            told = {k: getattr(self.weights, k) for k in ("base", "size", "voice", "hash")}
            _write(note, json.dumps(told, ensure_ascii=False, indent=1) + "\n")
            return set()
        try:
            made = Weights.of(json.loads(note.read_bytes()))
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise self._refusal(None, f"holds {some}, but no {RECEIPT} that says which weights made it") from error
        if made != self.weights:
            raise self._refusal(None, f"was made with {made}")
        return set()

    def _refusal(self, line: int | None, what: str) -> UsageError:
        where = f"--output {self.path}" if line is None else f"--output {self.path}, line {line}"
        return UsageError(
            f"{where}: {what}; asked for now is {self.weights}; name another --output, or delete this one"
        )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_all(
    transcripts: Iterable[Transcript], screen: TextIO, output: Output | None, form: Form, *, as_json: bool = False
) -> int:
    """Write transcripts as they come, to the screen or to ``output``; returns how many."""
    count = 0
    documents = []
    try:
        for transcript in transcripts:
            count += 1
            if as_json:
                documents.append(transcript.as_dict())
            elif output is None:
                _show(transcript, screen, form)
            if output is not None:
                output.store(transcript)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = output.path if output is not None else "standard output"
        then = "what was written stays, run it again to go on" if count > 1 else "name another --output"
        raise WorkError(f"{where}: cannot be written ({error}); {then}") from error
    if as_json:
        json.dump({"transcripts": documents}, screen, ensure_ascii=False, indent=1)
        screen.write("\n")
    return count


def _show(transcript: Transcript, screen: TextIO, form: Form) -> None:
    text = f"{transcript.id}\t{transcript.text}\n" if form == "text" else transcript.render(form)
    screen.write(text)
    screen.flush()
