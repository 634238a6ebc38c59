"""What no sampled subnet contains does not move: no momentum, no decay.

An optimiser sees a whole parameter even where a subnet sliced it, and takes the rest's gradient for zero: its momentum
goes on and its weights decay. Where the largest subnet is in every step nothing is outside; elsewhere this is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor
from torch.optim import Optimizer

from manyvoice.elastic.narrow import Elastic, Plan, Slice
from manyvoice.elastic.subnet import Subnet


def outside(elastic: Elastic, subnets: Sequence[Subnet]) -> dict[str, Tensor]:
    """For each parameter that is in part outside of all these subnets: True where it is outside."""
    plans = [elastic.plan(s) for s in subnets]
    names = {name for plan in plans for name in plan.slices}
    found = {}
    for name in names:
        p = elastic.model.get_parameter(name)
        inside = torch.zeros(p.shape, dtype=torch.bool, device=p.device)
        for plan in plans:
            if _holds(elastic, plan, name):
                _mark(inside, plan.slices.get(name, []))
        if not inside.all():
            found[name] = ~inside
    return found


@contextmanager
def held_still(optimizer: Optimizer, elastic: Elastic, regions: dict[str, Tensor]) -> Iterator[None]:
    """Weights, and the optimiser's state of the same shape, stay as they were in those regions."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for name, region in regions.items():
        p = elastic.model.get_parameter(name)
        tensors = [p, *(t for t in optimizer.state[p].values() if isinstance(t, Tensor) and t.shape == p.shape)]
        kept += [(t, region, t.detach().clone()) for t in tensors]
    yield
    with torch.no_grad():
        for t, region, before in kept:
            # picking the elements out would take several times as long
            torch.where(region, before, t, out=t)


def _holds(elastic: Elastic, plan: Plan, name: str) -> bool:
    """Whether the parameter is there at all in a subnet."""
    layers = f"{elastic.anatomy.layers}."
    if name.startswith(layers) and int(name[len(layers) :].split(".")[0]) not in plan.layers:
        return False
    return not any(name.startswith(f"{path}.") for path in plan.dropped)


def _mark(inside: Tensor, slices: Sequence[Slice]) -> None:
    for ranges in product(*(one.ranges for one in slices)):
        view = inside
        for one, (a, b) in zip(slices, ranges, strict=True):
            view = view.narrow(one.dim, a, b - a)
        view.fill_(True)
