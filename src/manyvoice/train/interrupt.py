"""Ctrl-C and SIGTERM end a run after the step in hand, with a checkpoint; a second one ends it at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import final

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class Interrupt:
    """A context in which the first signal only sets :attr:`asked`.

    Only the main thread may set signal handlers; elsewhere the context does nothing and is never asked.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        try:
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread
            self._before.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            self.__exit__()
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
