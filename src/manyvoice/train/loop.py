"""The only training loop. What varies is the objective, the step and the batches, all passed in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from manyvoice.train.step import Place
from manyvoice.types import Batch

MicroBatches = Sequence[Batch]


class Step(Protocol):
    """Updates the model from one step's micro-batches; a rank may have none of a ragged last one."""

    def __call__(self, micro: MicroBatches, place: Place) -> dict[str, float]: ...


def fit(
    step: Step,
    batches: Callable[[int, int], Iterable[MicroBatches]],
    place: Place,
    *,
    epochs: int,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, float]]:
    """Train from ``place`` to the end of ``epochs``; yields a log line after every step.

    Whoever consumes the lines evaluates and writes checkpoints between two of them: ``place`` then names the step
    that comes next, and nothing is in flight.

    Args:
        batches: the steps of (epoch, from which step on).
        stop: asked after each step; True ends the loop.
    """
    while place.epoch < epochs:
        for micro in batches(place.epoch, place.index):
            log = step(micro, place)
            place.advance()
            yield {"step": place.step, "epoch": place.passes, **log}
            if stop():
                return
