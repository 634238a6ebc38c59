"""Everything that is wrong with a corpus, found before training and named by file and line; nothing is dropped unsaid.

N utterances
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, Protocol, final

import numpy as np

from manyvoice.data.audio import DURATION_TOLERANCE
from manyvoice.data.manifest import Corpus
from manyvoice.data.utterance import FileAudio, Utterance
from manyvoice.errors import AudioError, CorpusError
from manyvoice.types import Seconds

Kind = Literal[
    "malformed row",
    "missing audio",
    "unreadable audio",
    "wrong duration",
    "beyond the end",
    "empty text",
    "duplicate id",
    "unknown characters",
    "unknown words",
    "too many labels",
    "silence",
    "fast speech",
]
WARNINGS: Final[frozenset[Kind]] = frozenset({"silence", "fast speech"})
_RATE: Final = 16_000


class TextTokenizer(Protocol):
    """What a check needs of a tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """Labels of a text."""

    def unknown(self, text: str) -> set[str]:
        """Characters or pieces of a text that it has no label for."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one row; ``index`` is its place in the corpus."""

    kind: Kind
    where: str
    message: str
    index: int

    @property
    def warning(self) -> bool:
        """Suspicious, but it can be trained on."""
        return self.kind in WARNINGS

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}: {self.message}"


@final
@dataclass(frozen=True)
class Report:
    """What `check` found, in the order of the corpus."""

    problems: tuple[Problem, ...]
    utterances: int

    def counts(self) -> Mapping[Kind, int]:
        """Problems of each kind, the most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def errors(self) -> tuple[Problem, ...]:
        """What cannot be trained on."""
        return tuple(problem for problem in self.problems if not problem.warning)

    def warnings(self) -> tuple[Problem, ...]:
        """What looks wrong but can be trained on."""
        return tuple(problem for problem in self.problems if problem.warning)

    def text(self, limit: int = 20) -> str:
        """A summary and the first ``limit`` problems, errors before warnings."""
        if not self.problems:
            return f"{self.utterances} utterances, no problems"
        ordered = self.errors() + self.warnings()
        kinds = ", ".join(f"{kind} {n}" for kind, n in self.counts().items())
        lines = [f"{self.utterances} utterances, {len(self.errors())} errors, {len(self.warnings())} warnings: {kinds}"]
        lines += [f"  {problem}" for problem in ordered[:limit]]
        if len(ordered) > limit:
            lines.append(f"  ... and {len(ordered) - limit} more")
        return "\n".join(lines)

    def raise_if_bad(self) -> None:
        """Raises: CorpusError if there are errors: the first one, how many of each kind, and what to do."""
        errors = self.errors()
        if errors:
            kinds = ", ".join(f"{kind} {n}" for kind, n in Counter(e.kind for e in errors).most_common())
            raise CorpusError(
                f"{errors[0]}\n{len(errors)} errors in {self.utterances} utterances ({kinds}); "
                "`manyvoice corpus check` lists all; correct them, or train without them with corpus.skip_bad=true"
            )

    def keep(self, corpus: Corpus) -> Corpus:
        """The corpus without the rows that have errors. Raises: CorpusError if it is not the one that was checked."""
        if len(corpus) != self.utterances:
            raise CorpusError(
                f"this report is about {self.utterances} utterances, the corpus has {len(corpus)}; check it again"
            )
        bad = [problem.index for problem in self.errors()]
        return corpus.subset(np.setdiff1d(np.arange(self.utterances), np.asarray(bad, dtype=np.int64)))


def check(
    corpus: Corpus,
    *,
    tokenizer: TextTokenizer | None = None,
    encoder_frames: Callable[[Seconds], int] | None = None,
    audio: bool = True,
    deep: bool = False,
    max_zscore: float = 4.0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Look at every row and the header of every sound.

    Args:
        tokenizer: finds characters without a label, and counts labels; characters are counted without one.
        encoder_frames: frames an utterance of so many seconds has after subsampling. CTC needs one for each label and
            one for the blank between two equal labels (Graves et al. 2006).
        audio: look at sound headers; False where they were looked at before.
        deep: decode all sound as well, which finds damage behind the header, and digital silence.
        max_zscore: rows with labels per second this many standard deviations above the mean are warned about, the
            usual rule for a text that belongs to other audio; only the upper tail, since pauses are no fault.
        progress: called with rows done and rows in all.
    """
    rows = _Rows(tokenizer, encoder_frames, audio, deep)
    for i in range(len(corpus)):
        try:
            utterance = corpus[i]
        except AudioError as error:
            rows.note("unreadable audio", _where(error), _why(error), i)
        except CorpusError as error:
            rows.note("malformed row", _where(error), _why(error), i)
        else:
            rows.look(utterance, i)
        if progress is not None:
            progress(i + 1, len(corpus))
    found = rows.problems + rows.fast_speech(max_zscore)
    return Report(tuple(sorted(found, key=lambda problem: problem.index)), len(corpus))


@final
class _Rows:
    """One pass over the corpus: what was found so far, and what must be remembered to find the rest."""

    def __init__(
        self,
        tokenizer: TextTokenizer | None,
        encoder_frames: Callable[[Seconds], int] | None,
        audio: bool,
        deep: bool,
    ) -> None:
        self.problems: list[Problem] = []
        self._tokenizer, self._encoder_frames, self._audio, self._deep = tokenizer, encoder_frames, audio, deep
        self._seen: dict[str, str] = {}
        self._speeds: list[tuple[float, int, str]] = []

    def note(self, kind: Kind, where: str, message: str, index: int) -> None:
        self.problems.append(Problem(kind, where, message, index))

    def look(self, utterance: Utterance, i: int) -> None:
        """Note what is wrong with a row that could be read."""
        if not 0 < utterance.duration < float("inf"):
            self.note("malformed row", utterance.where, f"duration = {utterance.duration}: must be positive seconds", i)
            return
        if utterance.id in self._seen:
            first = self._seen[utterance.id]
            self.note("duplicate id", utterance.where, f"id = {utterance.id!r}: is also at {first}; rename one", i)
        else:
            self._seen[utterance.id] = utterance.where
        if self._audio:
            self._look_at_audio(utterance, i)
        self._look_at_text(utterance, i)

    def fast_speech(self, max_zscore: float) -> list[Problem]:
        """Rows with far more labels per second than the others."""
        if len(self._speeds) < 2:
            return []
        speeds_N = np.asarray([speed for speed, _, _ in self._speeds])
        spread, mean = float(speeds_N.std()), float(speeds_N.mean())
        if spread <= 1e-9 * mean:
            return []
        what = "characters" if self._tokenizer is None else "labels"
        return [
            Problem("fast speech", where, f"{speed:.1f} {what} per second, the mean is {mean:.1f}; compare with it", i)
            for speed, i, where in self._speeds
            if (speed - mean) / spread > max_zscore
        ]

    def _look_at_audio(self, utterance: Utterance, i: int) -> None:
        audio = utterance.audio
        where = utterance.where
        try:
            if isinstance(audio, FileAudio) and not audio.path.exists():
                self.note("missing audio", where, f"{audio.path}: no such file; correct the path or leave it out", i)
                return
            there = audio.info().duration
            over = utterance.duration - there
            if over > DURATION_TOLERANCE:
                self.note("beyond the end", where, f"{audio.describe()} ends {over:.3f} s before the row does", i)
                return
            if -over > DURATION_TOLERANCE and isinstance(audio, FileAudio) and audio.offset is None:
                said = f"duration = {utterance.duration:g}: {audio.path} is {there:.3f} s long"
                self.note("wrong duration", where, f"{said}; correct it, or give an offset if it is a segment", i)
            if self._deep and not np.any(audio.read(_RATE)):
                self.note("silence", where, f"{audio.describe()} holds nothing but zeros; listen to it", i)
        except (AudioError, OSError) as error:
            self.note("unreadable audio", where, str(error), i)

    def _look_at_text(self, utterance: Utterance, i: int) -> None:
        text, where = utterance.text, utterance.where
        if not text.strip():
            if utterance.label is None:
                self.note("empty text", where, "text is empty; write what is said, or leave the row out", i)
            return
        labels: Sequence[object] = text
        if self._tokenizer is not None:
            if lacking := self._tokenizer.unknown(text):
                self._note_unknown(lacking, where, i)
                return
            labels = self._tokenizer.encode(text)
            if not labels:
                self.note("empty text", where, f"the tokenizer leaves nothing of {text[:40]!r}; leave the row out", i)
                return
        self._speeds.append((len(labels) / utterance.duration, i, where))
        if self._encoder_frames is None:
            return
        frames = self._encoder_frames(utterance.duration)
        needed = len(labels) + sum(a == b for a, b in pairwise(labels))
        if needed > frames:
            said = f"needs {needed} encoder frames for {len(labels)} labels, {utterance.duration:g} s give {frames}"
            self.note("too many labels", where, f"{said}; correct the text or the duration", i)

    def _note_unknown(self, lacking: set[str], where: str, i: int) -> None:
        # where every token is a word, what is unknown is one; a tokenizer that does not say is taken for one of pieces
        if getattr(self._tokenizer, "boundary", "prefix") == "every":
            said = "the tokenizer knows whole words and not these; leave the row out, or take another tokenizer"
            self.note("unknown words", where, f"{' '.join(sorted(lacking))!r}: {said}", i)
            return
        shown = ("" if all(len(c) == 1 for c in lacking) else " ").join(sorted(lacking))
        self.note("unknown characters", where, f"{shown!r}: the tokenizer has none; normalise the text", i)


def _where(error: CorpusError) -> str:
    return str(error).partition(": ")[0]


def _why(error: CorpusError) -> str:
    return str(error).partition(": ")[2]
