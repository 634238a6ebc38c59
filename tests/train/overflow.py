"""Run by test_limits.py in a process of its own: a step in an address space too small for it.

Prints how often it was cut, and the largest difference of a gradient from that of the step with room.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_limits import SETTINGS, step_of

from manyvoice.models import batchnorm
from manyvoice.models.parakeet import FAMILY
from manyvoice.train.limits import Limits
from manyvoice.train.objective import ctc
from manyvoice.train.step import Place
from manyvoice.types import Batch


def main() -> None:
    torch.set_num_threads(1)
    model: Any = FAMILY.build(SETTINGS, vocabulary=4, blank=3).double()
    batchnorm.freeze(model)
    B, T = 24, 1500
    x = torch.randn(B, T, 80, dtype=torch.float64)
    column = torch.full((B,), 2)
    batch = Batch(
        ids=tuple(map(str, range(B))), features_BTF=x, len_B=torch.full((B,), T), tokens_BU=torch.ones(B, 2).long(),
        token_len_B=column, owner_B=column, label_B=column, seconds_B=torch.full((B,), T / 100.0), cell=0,
    )  # fmt: skip
    whole, expected = step_of(model, ctc)
    for part in (batch.rows(0, 1), batch):  # the first loads what is loaded late
        whole([part], Place())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = Limits()
    cut, found = step_of(model, ctc, limits)
    resource.setrlimit(resource.RLIMIT_AS, (used + 80 * 2**20, resource.RLIM_INFINITY))
    cut([batch], Place())
    print(len(limits.versions), max(float((found[n] - g).abs().max()) for n, g in expected.items()))


if __name__ == "__main__":
    main()
