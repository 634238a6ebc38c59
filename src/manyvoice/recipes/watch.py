"""What a long piece of work tells whoever waits for it; the command line draws it, a script may ignore it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, final


class Watcher(Protocol):
    """Told what happens. Every method may do nothing."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` of a stage; equal ends it."""

    def step(self, line: Mapping[str, Any], epochs: int, left: float | None) -> None:
        """A training step's log line, the epochs of the run, and seconds to the end if known."""


@final
class Silent:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Nothing."""

    def step(self, line: Mapping[str, Any], epochs: int, left: float | None) -> None:
        """Nothing."""
