"""Learning rates as pure functions of the step, so that a resumed run needs no scheduler state.

Everywhere ``step`` counts optimiser updates from 0 and names the one about to be made; ``epoch`` is passes over the
data so far and may be a fraction. A warm-up of W steps is linear: ``(step + 1) / W`` of the peak, which step W - 1
reaches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor
from torch.optim import Optimizer

from manyvoice.errors import UsageError

ScheduleName = Literal["onecycle", "eden", "inverse-sqrt", "constant"]


class Schedule(ABC):
    """A learning rate for every moment of a run."""

    @abstractmethod
    def lr(self, step: int, epoch: float) -> float:
        """The learning rate of update ``step`` (from 0), ``epoch`` passes into the data."""


@final
@dataclass(frozen=True, kw_only=True)
class OneCycle(Schedule):
    """Linear warm-up to ``peak``, then half a cosine down to ``peak / final_divisor``. After Smith, arXiv:1708.07120.

    Args: warmup: share of ``total_steps``.  Past the end the last rate stays.
    Raises: UsageError naming the setting that is out of range.
    """

    peak: float
    total_steps: int
    warmup: float
    final_divisor: float

    def __post_init__(self) -> None:
        _check("lr", self.peak, self.peak > 0, "above 0")
        _check("total_steps", self.total_steps, self.total_steps >= 1, "1 or more")
        _check("warmup", self.warmup, 0 <= self.warmup <= 1, "a share of the steps, 0 to 1")
        _check("final_divisor", self.final_divisor, self.final_divisor >= 1, "1 or more")

    def lr(self, step: int, epoch: float) -> float:
        warmup = round(self.warmup * self.total_steps)
        if step < warmup:
            return self.peak * _warm(step, warmup)
        top, last = max(warmup - 1, 0), self.total_steps - 1
        progress = min(1.0, (step - top) / (last - top)) if last > top else 1.0 if step > last else 0.0
        final = self.peak / self.final_divisor
        return final + (self.peak - final) * (1 + math.cos(math.pi * progress)) / 2


@final
@dataclass(frozen=True, kw_only=True)
class Eden(Schedule):
    """``base (1 + (step / steps)^2)^-1/4 (1 + (epoch / epochs)^2)^-1/4``. Yao et al., arXiv:2310.11230.

    The first ``warmup_steps`` are multiplied by a line from ``warmup_start`` to 1. The defaults are those of icefall's
    zipformer recipe, as is its base of 0.045 for ScaledAdam.

    Raises: UsageError naming the setting that is out of range.
    """

    base: float
    steps: float = 7500.0
    epochs: float = 3.5
    warmup_steps: int = 500
    warmup_start: float = 0.1

    def __post_init__(self) -> None:
        _check("lr", self.base, self.base > 0, "above 0")
        _check("eden_steps", self.steps, self.steps > 0, "above 0")
        _check("eden_epochs", self.epochs, self.epochs > 0, "above 0")
        _check("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        _check("warmup_start", self.warmup_start, 0 < self.warmup_start <= 1, "above 0 and at most 1")

    def lr(self, step: int, epoch: float) -> float:
        by_step, by_epoch = 1 + (step / self.steps) ** 2, 1 + (epoch / self.epochs) ** 2
        rate = self.base / math.sqrt(math.sqrt(by_step * by_epoch))
        if step >= self.warmup_steps:
            return rate
        return rate * (self.warmup_start + (1 - self.warmup_start) * step / self.warmup_steps)


@final
@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Schedule):
    """Linear warm-up of W steps to ``peak``, then ``peak sqrt(W / (step + 1))``. Vaswani et al., arXiv:1706.03762.

    Raises: UsageError naming the setting that is out of range.
    """

    peak: float
    warmup_steps: int

    def __post_init__(self) -> None:
        _check("lr", self.peak, self.peak > 0, "above 0")
        _check("warmup_steps", self.warmup_steps, self.warmup_steps >= 1, "1 or more, the decay is measured by it")

    def lr(self, step: int, epoch: float) -> float:
        if step < self.warmup_steps:
            return self.peak * _warm(step, self.warmup_steps)
        return self.peak * math.sqrt(self.warmup_steps / (step + 1))


@final
@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """Linear warm-up to ``peak``, which then stays.

    Raises: UsageError naming the setting that is out of range.
    """

    peak: float
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check("lr", self.peak, self.peak > 0, "above 0")
        _check("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")

    def lr(self, step: int, epoch: float) -> float:
        return self.peak * _warm(step, self.warmup_steps)


def build_schedule(
    name: ScheduleName,
    *,
    lr: float,
    total_steps: int,
    warmup_steps: int,
    final_divisor: float = 100.0,
    eden_steps: float = 7500.0,
    eden_epochs: float = 3.5,
) -> Schedule:
    """The schedule of a run file; ``lr`` is its peak, and the warm-up is in steps for all of them.

    Args:
        total_steps, final_divisor: used by onecycle.
        eden_steps, eden_epochs: used by eden, icefall's; a run far shorter than 7500 steps wants smaller ones.
    Raises: UsageError naming the setting that is out of range.
    """
    if name == "onecycle":
        _check("total_steps", total_steps, total_steps >= 1, "1 or more")
        _check("warmup_steps", warmup_steps, 0 <= warmup_steps <= total_steps, f"0 to total_steps, {total_steps}")
        share = warmup_steps / total_steps
        return OneCycle(peak=lr, total_steps=total_steps, warmup=share, final_divisor=final_divisor)
    if name == "eden":
        return Eden(base=lr, steps=eden_steps, epochs=eden_epochs, warmup_steps=warmup_steps)
    if name == "inverse-sqrt":
        return InverseSqrt(peak=lr, warmup_steps=warmup_steps)
    if name == "constant":
        return Constant(peak=lr, warmup_steps=warmup_steps)
    raise UsageError(f"schedule must be onecycle, eden, inverse-sqrt or constant, but is {name!r}")


def apply(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group, in place where a group keeps it as a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _warm(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _check(field: str, value: float, holds: bool, rule: str) -> None:
    if not (holds and math.isfinite(value)):
        raise UsageError(f"{field} must be {rule}, but is {value}")
