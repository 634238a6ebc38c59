"""Batch sizes of a run: remembered from an earlier measurement of the same job, or measured now."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any, final

import torch
from accelerate import Accelerator

from manyvoice.config import RunConfig
from manyvoice.data.buckets import Bins
from manyvoice.decode.recogniser import Recogniser
from manyvoice.decode.speed import machine
from manyvoice.errors import UsageError
from manyvoice.recipes.ready import make_optimizer, passes_of, ready
from manyvoice.recipes.watch import Watcher
from manyvoice.train import profile
from manyvoice.train.accounting import available, large_blocks_apart
from manyvoice.train.memory import Counted, Shape, Trial, cuda_limit, fit_by_counting, fits_on_cuda, search
from manyvoice.train.profile import Profile
from manyvoice.types import Seconds

COUNTED = "counted on small batches, two real steps to confirm"
TRIED = "real steps until one ran out of memory"


@final
class Sizer:
    """Finds the batch sizes of a run's training, and keeps the profile they stand in.

    Args: again: measure even if it is remembered.
    """

    def __init__(self, run: RunConfig, accelerator: Accelerator, watcher: Watcher, *, again: bool = False) -> None:
        self.run, self.accelerator, self.watcher, self.again = run, accelerator, watcher, again
        self.profile: Profile | None = None

    def __call__(self, recogniser: Recogniser, bins: Bins, counts: Sequence[int]) -> tuple[tuple[int, ...], str]:
        """How many utterances of each bin fit into memory, and how that is known.

        Raises: UsageError if one utterance does not fit, or for more memory than an accelerator has.
        """
        ready(recogniser.model, self.run, self.accelerator)
        large_blocks_apart()
        key = key_of(recogniser, bins, counts, self.run, self.accelerator)
        known = None if self.again else profile.find(key)
        self.profile = known or self._measure(recogniser, bins, counts, key)
        return tuple(self.profile.sizes), f"what fits into {key['limit']} ({self.profile.how})"

    def _measure(self, recogniser: Recogniser, bins: Bins, counts: Sequence[int], key: dict[str, Any]) -> Profile:
        self.watcher.note(f"measuring how many utterances of {len(bins)} bins fit into memory")
        started = time.perf_counter()
        shapes = shapes_of(recogniser, bins)
        trial = Trial(
            recogniser.model,
            passes_of(recogniser.model, self.run),
            lambda: make_optimizer(recogniser.model, self.run),
            self.accelerator,
            bins=recogniser.log_mel.bins,
            ranks=self.accelerator.num_processes,
        )
        if self.accelerator.device.type == "cuda":
            with cuda_limit(fraction_of(self.run, self.accelerator.device)):
                found = Counted(sizes=search(shapes, counts, fits_on_cuda(trial)), bytes_of=[], confirmed=None)
        else:
            found = fit_by_counting(trial, shapes, counts, limit_of(self.run))
        seconds = time.perf_counter() - started
        made = Profile(
            key=key,
            bins=bins.cells,
            sizes=found.sizes,
            bytes_of=found.bytes_of,
            how=COUNTED if found.bytes_of else TRIED,
            confirmed=found.confirmed,
            seconds=round(seconds, 1),
        )
        where = profile.store(made)
        kept = f"kept in {where}" if where else "the cache folder cannot be written, so it is not kept"
        self.watcher.note(f"measured in {seconds:.0f} s; {kept}")
        return made


def shapes_of(recogniser: Recogniser, bins: Bins) -> list[Shape]:
    """The worst utterance of each bin."""
    frames = [recogniser.log_mel.frames(Seconds(s)) for s, _ in bins.cells]
    return [Shape(frames=f, tokens=t) for f, (_, t) in zip(frames, bins.cells, strict=True)]


def limit_of(run: RunConfig) -> int:
    """Bytes that training may take on a CPU: ``batch.memory``, or half of what is free."""
    return profile.parse_bytes(run.batch.memory) if run.batch.memory else available() // 2


def fraction_of(run: RunConfig, device: torch.device) -> float:
    """Share of an accelerator that training may take. UsageError for more than it has."""
    if run.batch.memory is None:
        return run.batch.fraction
    total = torch.cuda.get_device_properties(device).total_memory
    wanted = profile.parse_bytes(run.batch.memory)
    if wanted > total:
        raise UsageError(f"batch.memory = {run.batch.memory}: the device has {total / 2**30:.1f} GiB; ask for less")
    return wanted / total


def key_of(
    recogniser: Recogniser, bins: Bins, counts: Sequence[int], run: RunConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """Everything that the sizes depend on, readable, so that a difference can be named."""
    model = recogniser.model
    trained = [[n, list(p.shape), str(p.dtype)] for n, p in model.named_parameters() if p.requires_grad]
    # names of folders and versions say nothing about memory
    config = {k: v for k, v in model.config.to_diff_dict().items() if not k.startswith(("_", "transformers"))}
    cuda = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_name(accelerator.device) if cuda else machine()["processor"]
    if cuda or run.batch.memory:
        limit = run.batch.memory or f"{run.batch.fraction:g} of the device"
    else:
        limit = f"{round(limit_of(run) / 2**30)} GiB, half of what was free"
    return {
        "model": _digest(config),
        "trained parameters": _digest(trained),
        "optimizer": run.optimizer_name,
        "supernet": run.elastic and _digest(run.elastic.model_dump()),
        "precision": run.train.precision,
        "activation checkpointing": run.train.activation_checkpointing,
        "device": device,
        "limit": limit,
        "several ranks": accelerator.num_processes > 1,
        "torch": torch.__version__,
        "bins": _digest([list(c) for c in bins.cells]),
        "utterances": _digest(list(counts)),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
