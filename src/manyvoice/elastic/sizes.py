"""Sizes by budget: nested uniform subnets, each the best balanced one that a budget holds.

A uniform subnet keeps equally many heads and feed-forward chunks in each of its layers, and all convolutions, so it is
a stock model. Layers go in an order that leaves the rest evenly spread, the first and the last one longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import final

from transformers import PreTrainedModel

from manyvoice.elastic.subnet import Subnet, uniform, whole
from manyvoice.errors import UsageError
from manyvoice.models.anatomy import Anatomy, ComponentKind, Family
from manyvoice.models.cost import Costs, by_layer, by_part, cost_of

Measure = Callable[[Subnet], float]
_ELASTIC: tuple[ComponentKind, ...] = ("ff_chunk", "head")
# A size may leave so much of what fits its budget unused for the sake of balance; an e-fold of imbalance costs 0.15
# e-folds of it.
_UNUSED, _BALANCE = 0.3, 0.15
# And so much so that it is nested among sizes that are there.
_UNUSED_NESTED = 0.1


def layer_order(depth: int) -> list[int]:
    """Layers by how long they are kept: the first, the last, then whichever lies farthest from those kept so far."""
    order = [0, depth - 1][: max(1, min(2, depth))]
    while len(order) < depth:
        rest = [i for i in range(depth) if i not in order]
        order.append(max(rest, key=lambda i: (min(abs(i - j) for j in order), -i)))
    return order


@dataclass(frozen=True, order=True)
class Shape:
    """A uniform subnet in numbers: layers, feed-forward chunks and heads in each."""

    layers: int
    chunks: int
    heads: int


@final
class Grid:
    """All uniform subnets of a model."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model, self.family = model, family
        self.anatomy: Anatomy = family.anatomy(model)
        self._order = layer_order(self.anatomy.depth)

    @cached_property
    def largest(self) -> Shape:
        """The whole model's shape: the most units that any part has."""
        most = dict.fromkeys(_ELASTIC, 1)
        for _, components in by_layer(self.anatomy):
            for _, units in by_part(components):
                if units[0].kind in most:
                    most[units[0].kind] = max(most[units[0].kind], len(units))
        return Shape(self.anatomy.depth, most["ff_chunk"], most["head"])

    def subnet(self, shape: Shape, name: str) -> Subnet:
        """The subnet of that shape."""
        if shape == self.largest:
            return whole(self.anatomy, name)
        units: dict[ComponentKind, int] = {"ff_chunk": shape.chunks, "head": shape.heads}
        return uniform(self.anatomy, name, self._order[: shape.layers], units)

    def costs(self, subnet: Subnet) -> Costs:
        """What it costs."""
        return cost_of(self.model, self.family, subnet.kept, self.anatomy)

    def shapes(self, within: Shape | None = None) -> Iterator[Shape]:
        """All shapes nested in one, itself included."""
        top = within or self.largest
        for sides in product(range(1, top.layers + 1), range(1, top.chunks + 1), range(1, top.heads + 1)):
            yield Shape(*sides)

    def share(self, subnet: Subnet) -> float:
        """Of the whole model's multiply-accumulates in the encoder's layers, for ten seconds of audio."""
        return self.costs(subnet).layer_macs / self._all_layer_macs

    @cached_property
    def _all_layer_macs(self) -> float:
        return self.costs(whole(self.anatomy)).layer_macs

    def imbalance(self, shape: Shape) -> float:
        """Spread of the logarithms of what is kept of layers, chunks and heads; a dimension of one unit has no say."""
        kept = [
            math.log(have / all_)
            for have, all_ in zip(
                (shape.layers, shape.chunks, shape.heads),
                (self.largest.layers, self.largest.chunks, self.largest.heads),
                strict=True,
            )
            if all_ > 1
        ]
        return max(kept) - min(kept) if kept else 0.0


def nested_sizes(
    grid: Grid, budgets: Sequence[float], measure: Measure | None = None, *, beside: Sequence[Subnet] = ()
) -> list[Subnet]:
    """For each budget the subnet nearest below it that is well balanced; nested in one another, largest first.

    Args:
        budgets: limits in what ``measure`` tells; without one, shares of the whole model's layer MACs.
        measure: parameters, MACs, seconds on a device: anything that grows with the subnet.
        beside: sizes that each should contain or be contained in, if one does that leaves at most a tenth unused.
    Raises: UsageError if a budget is below what the smallest subnet takes, or two budgets give one size.
    """
    measure = measure or grid.share
    found: list[Subnet] = []
    within = grid.largest
    for budget in sorted(budgets, reverse=True):
        shape = _best(grid, budget, within, measure, beside)
        subnet = grid.subnet(shape, _name(budget if budget <= 1 else grid.share(grid.subnet(shape, ""))))
        if found and subnet.kept == found[-1].kept:
            raise UsageError(
                f"sizes: the budgets {budgets} give one subnet twice ({subnet.name} and {found[-1].name}); this model "
                f"has {grid.largest.layers} layers of {grid.largest.chunks} chunks and {grid.largest.heads} heads: "
                "leave more room between them"
            )
        if any(subnet.name == other.name for other in found):
            raise UsageError(f"sizes: the budgets {budgets} give two sizes the name {subnet.name}; leave more room")
        found.append(subnet)
        within = shape
    return found


def is_nested(subnet: Subnet, sizes: Sequence[Subnet]) -> bool:
    """Whether it contains, or is contained in, each of them."""
    return all(subnet in size or size in subnet for size in sizes)


def _best(grid: Grid, budget: float, within: Shape, measure: Measure, beside: Sequence[Subnet]) -> Shape:
    values = {shape: measure(grid.subnet(shape, "")) for shape in grid.shapes(within)}
    fitting = {shape: value for shape, value in values.items() if value <= budget * (1 + 1e-9)}
    if not fitting:
        least = min(values.values())
        raise UsageError(f"sizes: a budget of {budget:g} is below the smallest subnet, which takes {least:.3g}")
    most = max(fitting.values())
    if most == max(values.values()) and budget >= most:
        return max(fitting, key=lambda s: (fitting[s], s))
    near = [s for s, value in fitting.items() if value >= most * (1 - _UNUSED)]
    if beside:
        # the line of sizes stays one, if that leaves little unused
        there = {size.kept for size in beside}
        subnets = {s: grid.subnet(s, "") for s in near if fitting[s] >= most * (1 - _UNUSED_NESTED)}
        near = [s for s, n in subnets.items() if n.kept not in there and is_nested(n, beside)] or near
    return min(near, key=lambda s: (math.log(most / fitting[s]) + _BALANCE * grid.imbalance(s), s))


def _name(share: float) -> str:
    # 12.5 and 12 are two sizes
    return f"{100 * share:.4g}"
