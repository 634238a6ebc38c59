"""Everything manyvoice raises on purpose.

    ManyvoiceError
    ├── UsageError            the words were wrong: a flag, a run file, a combination (exit status 2)
    │   └── ConfigError       a run file or an override; lists every mistake at once
    └── WorkError             the work failed (exit status 1)
        ├── CorpusError       a manifest or a row of one
        │   └── AudioError    a sound file that cannot be opened or decoded
        ├── ModelError        a model folder, its anatomy or its tokenizer
        ├── VoiceError        a submodel's file, its store, or a base that it was not made for
        ├── CheckpointError   a checkpoint that is damaged, foreign or cannot be written
        ├── DecodeError       decoding or scoring that cannot be done as asked
        └── SynthesisError    a voice that cannot be spoken

Every message names the field or file, the value, the rule and the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ManyvoiceError(Exception):
    """Root of the tree; the command line prints its text without a traceback."""

    exit_status = 1


class UsageError(ManyvoiceError):
    """The words were wrong."""

    exit_status = 2


@dataclass(frozen=True)
class Mistake:
    """One thing wrong in a run file: where, what stands there, the rule, the way out."""

    field: str
    value: object
    rule: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.rule}; {self.way_out}"


class ConfigError(UsageError):
    """All mistakes of a run file together."""

    def __init__(self, where: str, mistakes: Sequence[Mistake]):
        self.where = where
        self.mistakes = tuple(mistakes)
        count = "1 mistake" if len(self.mistakes) == 1 else f"{len(self.mistakes)} mistakes"
        lines = [f"{where} has {count}:", *(f"  {mistake}" for mistake in self.mistakes)]
        super().__init__("\n".join(lines))


class WorkError(ManyvoiceError):
    """The work failed."""


class CorpusError(WorkError):
    """A manifest or one of its rows."""


class AudioError(CorpusError):
    """A sound file that cannot be opened or decoded."""


class ModelError(WorkError):
    """A model folder, its anatomy or its tokenizer."""


class VoiceError(WorkError):
    """A submodel's file, its store, or a base that it was not made for."""


class CheckpointError(WorkError):
    """A checkpoint that is damaged, foreign or cannot be written."""


class DecodeError(WorkError):
    """Decoding or scoring that cannot be done as asked."""


class SynthesisError(WorkError):
    """A voice that cannot be spoken."""
