"""Ranks, devices and precision, through accelerate: plain ``python`` and ``torchrun`` alike."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn

Precision = Literal["fp32", "bf16", "fp64"]
# DistributedDataParallel's bucket is 25 MB; twice that keeps links busy and costs little memory.
CHUNK_BYTES = 64 * 2**20
# Ranks that are done wait for the slowest, who may have hours of work left; if one dies, torchrun ends all.
PATIENCE = datetime.timedelta(days=1)


def start(precision: Precision, *, cpu: bool = False) -> Accelerator:
    """The process group if torchrun started several processes, the device, and autocast for bf16."""
    # it is shared by all accelerators of a process, and would refuse a second run of another precision
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=cpu or not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def stop_group() -> None:
    """Leave the process group, if there is one, so that torchrun ends without a warning."""
    with contextlib.suppress(ValueError, RuntimeError):
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def summed(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Elementwise sum over ranks, in float64."""
    values = values.to(accelerator.device, torch.float64)
    if accelerator.num_processes > 1:
        dist.all_reduce(values)
    return values


def smallest(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Elementwise minimum over ranks, int64."""
    values = values.to(accelerator.device, torch.int64)
    if accelerator.num_processes > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values.cpu()


def same_names(accelerator: Accelerator, names: Iterable[str]) -> list[str]:
    """Names that any rank has, sorted; all ranks get the same list."""
    found: list[list[str]] = [[] for _ in range(accelerator.num_processes)]
    if accelerator.num_processes == 1:
        return sorted(names)
    dist.all_gather_object(found, list(names))
    return sorted({name for part in found for name in part})


def exchange_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Sum every gradient over ranks, once a step, after all micro-batches.

    A parameter that has a gradient on some rank gets one on all; one that has none anywhere keeps none, so that an
    optimiser leaves it alone. Small gradients travel together, CHUNK_BYTES at most; large ones where they lie.

    Unlike a DistributedDataParallel wrapper this needs no backward pass of its own on every rank: ranks may run other
    numbers of micro-batches, or other subnets, and a step that ran out of memory on one can be begun again by all.
    """
    if accelerator.num_processes == 1:
        return
    named = [p for p in parameters if p.requires_grad]
    here = torch.tensor([p.grad is not None for p in named], dtype=torch.float64)
    anywhere = summed(accelerator, here) > 0
    used = [p for p, one in zip(named, anywhere.tolist(), strict=True) if one]
    for p in used:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for together in _chunks(used):
        if len(together) == 1 and together[0].is_contiguous():
            dist.all_reduce(together[0])
            continue
        flat = torch.cat([g.reshape(-1) for g in together])
        dist.all_reduce(flat)
        for g, part in zip(together, flat.split([g.numel() for g in together]), strict=True):
            g.copy_(part.view_as(g))


def _chunks(parameters: Iterable[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Gradients in order, as many of one type together as CHUNK_BYTES hold."""
    together: list[Tensor] = []
    held = 0
    for p in parameters:
        assert p.grad is not None
        size = p.grad.numel() * p.grad.element_size()
        if together and (held + size > CHUNK_BYTES or together[0].dtype != p.grad.dtype):
            yield together
            together, held = [], 0
        together.append(p.grad)
        held += size
    if together:
        yield together


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any rank says so; all ranks get the same answer."""
    if accelerator.num_processes == 1:
        return flag
    return bool(summed(accelerator, torch.tensor([float(flag)]))[0] > 0)
