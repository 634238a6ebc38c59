"""Ranks, devices and precision, through accelerate: plain ``python`` and ``torchrun`` alike."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

Precision = Literal["fp32", "bf16", "fp64"]


def start(precision: Precision, *, cpu: bool = False) -> Accelerator:
    """The process group if torchrun started several processes, the device, and autocast for bf16.

    Buffers are not broadcast by DDP: BatchNorm's statistics are exchanged once a step by our own rule.
    """
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=False)
    # it is shared by all accelerators of a process, and would refuse a second run of another precision
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=cpu or not torch.cuda.is_available(),
        kwargs_handlers=[ddp],
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


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any rank says so; all ranks get the same answer."""
    if accelerator.num_processes == 1:
        return flag
    return bool(summed(accelerator, torch.tensor([float(flag)]))[0] > 0)
