"""One optimiser step from micro-batches; plain training's step.

All ranks together compute the gradient of (sum of totals) / (sum of weights) over the whole step, so the result does
not depend on how the step was cut into micro-batches or shared among ranks, but for the order of the additions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import final

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from manyvoice.errors import WorkError
from manyvoice.models.batchnorm import settle, unseen
from manyvoice.train.distributed import summed
from manyvoice.train.objective import Loss, Objective
from manyvoice.train.optim import ScaledAdam
from manyvoice.train.schedule import Schedule, apply
from manyvoice.types import Batch


@dataclass
class Place:
    """Where a run is: updates made, the epoch, and the next step of that epoch."""

    step: int = 0
    epoch: int = 0
    index: int = 0
    steps_per_epoch: int = 1

    @property
    def passes(self) -> float:
        """Passes over the data so far."""
        return self.epoch + self.index / self.steps_per_epoch

    def advance(self) -> None:
        """After a step."""
        self.step += 1
        self.index += 1
        if self.index >= self.steps_per_epoch:
            self.epoch, self.index = self.epoch + 1, 0


def stream_seed(seed: int, step: int, micro: int) -> int:
    """Seed of the random numbers of one micro-batch, 63 bits of blake2b."""
    digest = blake2b(f"{seed} {step} {micro}".encode(), digest_size=8, person=b"step.v1").digest()
    return int.from_bytes(digest, "little") >> 1


@final
class _Objective(nn.Module):
    """Model and objective as one module, because DDP hooks into forward passes only."""

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, float]]:
        loss: Loss = self.objective(self.model, batch)
        return loss.total, loss.weight, loss.counts


@final
class PlainStep:
    """Forward, backward, exchange, clip, update.

    Dropout's random numbers follow from (seed, step, place of the micro-batch in the step), so they are the same after
    a resume and on any number of ranks.

    Args: clip: the largest norm of the gradient; None leaves it, and ScaledAdam clips by itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        optimizer: Optimizer,
        schedule: Schedule,
        accelerator: Accelerator,
        *,
        clip: float | None,
        seed: int,
    ) -> None:
        self.model, self.optimizer, self.schedule, self.accelerator = model, optimizer, schedule, accelerator
        self.seed = seed
        self.clip = None if isinstance(optimizer, ScaledAdam) else clip
        self.wrapped: nn.Module = _Objective(model, objective)
        if accelerator.num_processes > 1:
            self.wrapped = accelerator.prepare_model(self.wrapped)

    def __call__(self, micro: Sequence[tuple[Batch, bool]], place: Place) -> dict[str, float]:
        """Update the model. WorkError names the utterances if the loss is not finite."""
        lr = self.schedule.lr(place.step, place.passes)
        apply(self.optimizer, lr)
        self.model.train()
        sums: dict[str, float] = {}
        for k, (batch, counts) in enumerate(micro):
            last = k == len(micro) - 1
            number = k * self.accelerator.num_processes + self.accelerator.process_index
            torch.manual_seed(stream_seed(self.seed, place.step, number))
            exchange = nullcontext() if last else self.accelerator.no_sync(self.wrapped)
            with exchange, nullcontext() if counts else unseen(self.model):
                self._backward(batch, counts, sums, place)
        names = sorted(sums)
        everywhere = summed(self.accelerator, torch.tensor([sums[n] for n in names], dtype=torch.float64)).tolist()
        sums = dict(zip(names, everywhere, strict=True))
        weight = max(sums["weight"], 1.0)
        norm = self._finish_gradient(self.accelerator.num_processes / weight)
        if norm is not None and not math.isfinite(norm):
            raise _not_finite("gradient", norm, place, [i for batch, _ in micro for i in batch.ids])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        settle(self.model)
        log = {"loss": sums.pop("total") / weight, "lr": lr, "tokens": sums.pop("weight")}
        return log | ({} if norm is None else {"grad_norm": norm}) | sums

    def _backward(self, batch: Batch, counts: bool, sums: dict[str, float], place: Place) -> None:
        batch = batch.to(self.accelerator.device, self.model.dtype)
        with self.accelerator.autocast():
            total, weight, extra = self.wrapped(batch)
        value = float(total.detach())
        if not math.isfinite(value):
            raise _not_finite("loss", value, place, batch.ids)
        self.accelerator.backward(total if counts else total * 0.0)
        found = {"total": value, "weight": float(weight), "utterances": float(len(batch))}
        found["audio_seconds"] = float(batch.seconds_B.sum())
        found["frames"] = float(batch.len_B.sum())
        found["padded_frames"] = float(batch.features_BTF.shape[0] * batch.features_BTF.shape[1])
        for name, value in (found | extra).items():
            sums[name] = sums.get(name, 0.0) + (value if counts else 0.0)

    def _finish_gradient(self, scale: float) -> float | None:
        """DDP has averaged sums over ranks: multiply by ranks / weight, then clip to ``clip``."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not gradients:
            return None
        torch._foreach_mul_(gradients, scale)
        if self.clip is None:
            return None
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        return float(norm)


def _not_finite(what: str, value: float, place: Place, ids: Sequence[str]) -> WorkError:
    """Raised before the weights move, so that no checkpoint holds what is not a number."""
    return WorkError(
        f"the {what} is {value} at step {place.step} on {', '.join(ids[:8])}; resume from the last "
        "checkpoint with a lower optimizer.lr or train.precision=fp32, or look at those utterances"
    )
