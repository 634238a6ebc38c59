"""Which subnets a step trains: the sandwich rule, as a pure function of (seed, step).

Every rank asks the same question and gets the same answer, and so does a run that is resumed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from manyvoice.elastic.sizes import Grid, Shape
from manyvoice.elastic.subnet import Subnet
from manyvoice.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A subnet that a step trains. Role: ``largest``, ``smallest`` or ``other``."""

    subnet: Subnet
    role: str


@final
class Sandwich:
    """The largest first, then some of the rest (Yu & Huang, arXiv:1903.05134; AlphaNet, arXiv:2102.07954).

    AlphaNet trains the smallest and two random ones in every step. With ``others`` of 1 a step trains one more beside
    the largest, in turn the smallest and a random one.

    Args:
        sizes: named subnets, nested; the first is the largest and the last the smallest.
        grid: what random ones are drawn from besides the sizes: any uniform subnet between the smallest and the
            largest; None draws sizes only.
        others: subnets beside the largest in a step; fewer where so many sizes are not named.
        named: share of random draws that are one of the sizes.
        alone: steps at the beginning that train the smallest alone. Every larger one contains it, so all of them begin
            from what it learned, in less time than any of them would have taken (progressive training, as in
            Gong et al., ICML 2019, who stack layers).
    Raises: UsageError if the sizes are no two nested subnets, or out of order.
    """

    def __init__(
        self,
        sizes: Sequence[Subnet],
        *,
        seed: int,
        others: int = 2,
        grid: Grid | None = None,
        named: float = 1.0,
        alone: int = 0,
    ) -> None:
        if len(sizes) < 2 or any(small not in large for large, small in zip(sizes, sizes[1:], strict=False)):
            raise UsageError("sampling wants two or more nested sizes, largest first; see elastic.sizes")
        self.sizes: Sequence[Subnet] = tuple(sizes)
        self.seed, self.others, self.named, self.alone = seed, others, named, alone
        self.largest, self.smallest = self.sizes[0], self.sizes[-1]
        self._pool = [] if grid is None else _between(grid, self.largest, self.smallest)

    def draw(self, step: int) -> list[Drawn]:
        """What the step trains: the largest first, the smallest last; at the beginning the smallest alone."""
        rng = random.Random(f"sandwich {self.seed} {step}")
        largest, smallest = (
            Drawn(subnet=self.largest, role="largest"),
            Drawn(subnet=self.smallest, role="smallest"),
        )
        if step < self.alone:
            return [smallest]
        if self.others == 1:
            between = self._random(rng, 1) if step % 2 else []
            return [largest, *(between or [smallest])]
        return [largest, *self._random(rng, self.others - 1), smallest]

    def _random(self, rng: random.Random, count: int) -> list[Drawn]:
        """So many between the largest and the smallest, none twice: fewer where there are no more."""
        drawn: dict[frozenset[str], Subnet] = {}
        named = rng.sample(self.sizes[1:-1], len(self.sizes) - 2)
        for _ in range(count):
            if self._pool and rng.random() >= self.named:
                left = [subnet for subnet in self._pool if subnet.kept not in drawn]
                some = [rng.choice(left)] if left else []
            else:
                named = [subnet for subnet in named if subnet.kept not in drawn]
                some = [named.pop()] if named else []
            drawn |= {subnet.kept: subnet for subnet in some}
        return [Drawn(subnet=subnet, role="other") for subnet in drawn.values()]


@final
class Alone:
    """One size a step, drawn at random, as training without the sandwich rule does."""

    def __init__(self, sizes: Sequence[Subnet], *, seed: int) -> None:
        self.sizes: Sequence[Subnet] = tuple(sizes)
        self.seed = seed

    def draw(self, step: int) -> list[Drawn]:
        """The one subnet of the step."""
        k = random.Random(f"alone {self.seed} {step}").randrange(len(self.sizes))
        return [Drawn(subnet=self.sizes[k], role="other" if k else "largest")]


def _between(grid: Grid, largest: Subnet, smallest: Subnet) -> list[Subnet]:
    """All uniform subnets strictly between the two."""
    shapes: dict[Shape, Subnet] = {shape: grid.subnet(shape, "random") for shape in grid.shapes()}
    return [
        s for s in shapes.values() if s in largest and smallest in s and s.kept not in (largest.kept, smallest.kept)
    ]
