"""The best subnet for a budget by random search: what sizes along a line of budgets are compared with."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from manyvoice.elastic.sizes import Grid, Measure
from manyvoice.elastic.subnet import Subnet, whole
from manyvoice.errors import UsageError
from manyvoice.models.cost import by_layer, by_part

# How near to the budget a subnet must come: smaller ones would only be worse.
NEAR = 0.9
_TRIES = 50


@dataclass(frozen=True, kw_only=True)
class Found:
    """A subnet, what it takes of the budget, and how it scored; a lower score is better."""

    subnet: Subnet
    taken: float
    score: float


def random_search(
    grid: Grid,
    budget: float,
    score: Callable[[Subnet], float],
    *,
    tries: int,
    seed: int = 0,
    measure: Measure | None = None,
) -> list[Found]:
    """Subnets of any shape that take 90 to 100 % of the budget, scored; the best first.

    What there is none of in any size stays out: no layer is kept without its convolution. A budget above the whole
    model's is the whole model's.

    Args: score: an error rate on development data, passed in.  measure: what the budget counts, if not MAC shares.
    Raises: UsageError if no subnet comes near the budget.
    """
    measure = measure or grid.share
    budget = min(budget, measure(whole(grid.anatomy)))
    found = []
    for subnet in _drawn(grid, budget, measure, tries, seed):
        found.append(Found(subnet=subnet, taken=measure(subnet), score=score(subnet)))
    if not found:
        raise UsageError(f"search: found no subnet that takes {NEAR:.0%} to 100 % of {budget:.3g}; ask for more")
    return sorted(found, key=lambda f: f.score)


def _drawn(grid: Grid, budget: float, measure: Measure, tries: int, seed: int) -> Iterator[Subnet]:
    rng = random.Random(f"search {seed} {budget}")
    seen: set[frozenset[str]] = set()
    # as many again as asked for may come out twice, or miss by a unit
    for _ in range(_TRIES * tries):
        if len(seen) == tries:
            return
        # some stop short of the budget, or the whole would be all that fits its own
        target = budget * rng.uniform(NEAR, 1 + 1e-9)
        subnet = _trimmed(grid, target, measure, rng, f"search-{len(seen)}")
        if subnet is not None and subnet.kept not in seen and NEAR * budget <= measure(subnet):
            seen.add(subnet.kept)
            yield subnet


def _trimmed(grid: Grid, budget: float, measure: Measure, rng: random.Random, name: str) -> Subnet | None:
    """Some layers at random, and of their heads and chunks, the first ones, as many as the budget holds.

    Units leave in a random order until the rest fits, each part's last one first and none to its last one.
    """
    depth = grid.anatomy.depth
    layers = set(rng.sample(range(depth), rng.randint(1, depth)))
    kept = {c.name for c in grid.anatomy.components if c.layer in layers}
    leaving: list[list[str]] = []
    for i, components in by_layer(grid.anatomy):
        for _, units in by_part(components) if i in layers else ():
            leaving += [[c.name for c in units]] * (len(units) - 1)
    rng.shuffle(leaving)
    order, left = [], {part[0]: len(part) for part in leaving}
    for part in leaving:
        left[part[0]] -= 1
        order.append(part[left[part[0]]])

    def without(count: int) -> Subnet:
        return Subnet(name=name, kept=frozenset(kept.difference(order[:count])))

    # fewer of them leave a larger subnet: the first count that fits
    first = bisect_left(range(len(order) + 1), x=True, key=lambda count: measure(without(count)) <= budget)
    return without(first) if first <= len(order) else None
