"""The best subnet for a budget by random search: what sizes along a line of budgets are compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from manyvoice.elastic.sizes import Grid, Measure
from manyvoice.elastic.subnet import Subnet
from manyvoice.errors import UsageError
from manyvoice.models.cost import by_layer, by_part

# How near to the budget a subnet must come: smaller ones would only be worse.
NEAR = 0.9
_TRIES = 2000


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

    Args: score: an error rate on development data, passed in.  measure: what the budget counts, if not MAC shares.
    Raises: UsageError if no subnet comes near the budget.
    """
    measure = measure or grid.share
    found = []
    for subnet in _drawn(grid, budget, measure, tries, seed):
        found.append(Found(subnet=subnet, taken=measure(subnet), score=score(subnet)))
    if not found:
        raise UsageError(f"search: no subnet takes {NEAR:.0%} to 100 % of a budget of {budget:g}; ask for another")
    return sorted(found, key=lambda f: f.score)


def _drawn(grid: Grid, budget: float, measure: Measure, tries: int, seed: int) -> Iterator[Subnet]:
    rng = random.Random(f"search {seed} {budget}")
    seen: set[frozenset[str]] = set()
    for _ in range(_TRIES):
        if len(seen) == tries:
            return
        subnet = _any(grid, rng, f"search-{len(seen)}")
        if subnet.kept not in seen and NEAR * budget <= measure(subnet) <= budget:
            seen.add(subnet.kept)
            yield subnet


def _any(grid: Grid, rng: random.Random, name: str) -> Subnet:
    """Layers at random, and in each of them another number of heads and chunks, the first ones."""
    depth = rng.randint(1, grid.anatomy.depth)
    layers = set(rng.sample(range(grid.anatomy.depth), depth))
    kept: set[str] = set()
    for i, components in by_layer(grid.anatomy):
        if i not in layers:
            continue
        kept.update(c.name for c in components if c.kind == "layer")
        for _, units in by_part(components):
            kept.update(c.name for c in units[: rng.randint(1, len(units))])
    return Subnet(name=name, kept=frozenset(kept))
