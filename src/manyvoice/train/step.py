"""One optimiser step from micro-batches.

All ranks together compute the gradient of (sum of totals) / (sum of weights) over the whole step, so the result does
not depend on how the step was cut into micro-batches or shared among ranks, but for the order of the additions. That
is also why a step that runs out of memory can be cut smaller and begun again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import final
from zlib import crc32

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from manyvoice.data.padding import padding_of
from manyvoice.errors import WorkError
from manyvoice.models.batchnorm import discard, settle
from manyvoice.train.distributed import exchange_gradients, same_names, summed
from manyvoice.train.limits import Limits, Overflow
from manyvoice.train.memory import out_of_memory
from manyvoice.train.objective import Loss, Passes
from manyvoice.train.optim import ScaledAdam
from manyvoice.train.schedule import Schedule, apply
from manyvoice.types import Batch

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


@dataclass
class Place:
    """Where a run is: updates made, the epoch, and the next step of that epoch.

    Args: steps_of: how many steps an epoch has.
    """

    step: int = 0
    epoch: int = 0
    index: int = 0
    steps_of: Callable[[int], int] = lambda epoch: 1

    @property
    def passes(self) -> float:
        """Passes over the data so far."""
        return self.epoch + self.index / self.steps_of(self.epoch)

    def advance(self) -> None:
        """After a step."""
        self.step += 1
        self.index += 1
        if self.index >= self.steps_of(self.epoch):
            self.epoch, self.index = self.epoch + 1, 0


def stream_seed(seed: int, step: int, micro: int, piece: int = 0) -> int:
    """Seed of the random numbers of one micro-batch, or of a piece of it; 63 bits of blake2b."""
    key = f"{seed} {step} {micro}" + (f" {piece}" if piece else "")
    digest = blake2b(key.encode(), digest_size=8, person=b"step.v1").digest()
    return int.from_bytes(digest, "little") >> 1


@final
class PlainStep:
    """Forward, backward, exchange, clip, update.

    Dropout's random numbers follow from (seed, step, place of the micro-batch in the step), so they are the same after
    a resume and on any number of ranks.

    Args:
        passes: what is minimised on a micro-batch; plain training has one pass, a supernet one for each subnet.
        clip: the largest norm of the gradient; None leaves it, and ScaledAdam clips by itself.
        limits: how many utterances of a cell run at once, where that is fewer than the plan's; lowered, on all ranks
            alike, when a step runs out of memory.
    Attributes: around_update: of a step's number, entered while the optimiser moves the weights; a caller may set it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        passes: Passes,
        optimizer: Optimizer,
        schedule: Schedule,
        accelerator: Accelerator,
        *,
        clip: float | None,
        seed: int,
        limits: Limits | None = None,
    ) -> None:
        self.model, self.optimizer, self.schedule, self.accelerator = model, optimizer, schedule, accelerator
        self.around_update: Callable[[int], AbstractContextManager[object]] = lambda step: nullcontext()
        self.passes, self.seed = passes, seed
        self.clip = None if isinstance(optimizer, ScaledAdam) else clip
        self.limits = limits or Limits()
        self._names: list[str] | None = None
        self._parameters = list(model.parameters())

    def __call__(self, micro: Sequence[Batch], place: Place) -> dict[str, float]:
        """Update the model. WorkError names the utterances if the loss is not finite."""
        lr = self.schedule.lr(place.step, place.passes)
        apply(self.optimizer, lr)
        self.model.train()
        sums = self._gradients(micro, place)
        cells = {batch.cell for batch in micro}
        if self._names is None:
            self._names = same_names(self.accelerator, sums)
        local = torch.tensor([sums.get(n, 0.0) for n in self._names], dtype=torch.float64)
        sums = dict(zip(self._names, summed(self.accelerator, local).tolist(), strict=True))
        exchange_gradients(self.accelerator, self._parameters)
        weight = max(sums["weight"], 1.0)
        norm = self._finish_gradient(1.0 / weight)
        if not math.isfinite(norm):
            raise _not_finite("gradient", norm, place, [i for batch in micro for i in batch.ids])
        with self.around_update(place.step):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        settle(self.model)
        log = {"loss": sums.pop("total") / weight, "lr": lr, "tokens": sums.pop("weight")}
        log |= {"cell": cells.pop() if len(cells) == 1 else -1, "grad_norm": norm}
        return log | {n: v / weight if n.startswith("loss_") else v for n, v in sums.items()}

    def _gradients(self, micro: Sequence[Batch], place: Place) -> dict[str, float]:
        """Sums of this rank's micro-batches, their gradients left in the model; cut smaller until all ranks fit."""
        while True:
            sums: dict[str, float] = {}
            overflow = self._attempt(micro, place, sums)
            if not self.limits.agree(self.accelerator, overflow, place.step):
                return sums
            # the error and the frames that held its tensors are gone by now, so the memory really is free
            self.optimizer.zero_grad(set_to_none=True)
            discard(self.model)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _attempt(self, micro: Sequence[Batch], place: Place, sums: dict[str, float]) -> Overflow | None:
        """Run the micro-batches within the limits; the first that did not fit, if one did not."""
        for k, whole in enumerate(micro):
            number = k * self.accelerator.num_processes + self.accelerator.process_index
            for piece, batch in enumerate(self.limits.pieces(whole)):
                torch.manual_seed(stream_seed(self.seed, place.step, number, piece))
                try:
                    self._backward(batch, sums, place)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    return Overflow.of(batch)
        return None

    def _backward(self, batch: Batch, sums: dict[str, float], place: Place) -> None:
        batch = batch.to(self.accelerator.device, self.model.dtype)
        found: dict[str, float] = {}
        # closed even when memory runs out in between, so that a narrowed model is whole again
        with closing(self.passes(self.model, batch, place.step)) as losses:
            while (loss := self._next(losses)) is not None:
                value = float(loss.total.detach())
                if not math.isfinite(value):
                    raise _not_finite("loss", value, place, batch.ids)
                self.accelerator.backward(loss.total)
                if not found:
                    found = {"total": value, "weight": float(loss.weight)} | padding_of(batch)
                found |= loss.counts
        # says which utterances a step had, whatever ranks shared it: sums of 32-bit numbers are exact
        found["ids"] = float(sum(crc32(i.encode()) for i in batch.ids))
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value

    def _next(self, losses: Generator[Loss, None, None]) -> Loss | None:
        with self.accelerator.autocast():
            return next(losses, None)

    def _finish_gradient(self, scale: float) -> float:
        """From sums to means, clipped to ``clip``, in one multiplication; returns the norm of the means."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if not gradients:
            return 0.0
        norm = float(nn.utils.get_total_norm(gradients)) * scale
        torch._foreach_mul_(gradients, scale if self.clip is None else scale * min(1.0, self.clip / (norm + CLIP_EPS)))
        return norm


def _not_finite(what: str, value: float, place: Place, ids: Sequence[str]) -> WorkError:
    """Raised before the weights move, so that no checkpoint holds what is not a number."""
    return WorkError(
        f"the {what} is {value} at step {place.step} on {', '.join(ids[:8])}; resume from the last "
        "checkpoint with a lower optimizer.lr or train.precision=fp32, or look at those utterances"
    )
