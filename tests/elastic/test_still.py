"""What no subnet of a step contains stays bit for bit, with either optimiser."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.still import held_still, outside
from manyvoice.elastic.subnet import uniform, whole
from manyvoice.train.objective import ctc
from manyvoice.train.optim import OptimizerName, build_optimizer
from manyvoice.types import Batch


@pytest.mark.parametrize(("name", "decay"), [("adamw", 0.5), ("scaledadam", 0.0)])
def test_momentum_and_decay_stay_inside(
    name: OptimizerName, decay: float, batch: Batch, small: Callable[..., PreTrainedModel]
) -> None:
    model = small().train()
    elastic = Elastic(model)
    subnet = uniform(elastic.anatomy, "x", [0, 2], {"head": 2, "ff_chunk": 1})
    optimizer = build_optimizer(model.named_parameters(), name, 1e-2, decay, (0.9, 0.98), 1e-8)
    ctc(model, batch).total.backward()  # momentum everywhere
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {n: _state(optimizer, p) for n, p in model.named_parameters()}
    with elastic.at(subnet):
        ctc(model, batch).total.backward()
    regions = outside(elastic, [subnet])
    with held_still(optimizer, elastic, regions):
        optimizer.step()
    plan = elastic.plan(subnet)
    moved, remembered = 0, 0
    for n, p in model.named_parameters():
        if n.startswith("encoder.layers.1."):
            assert torch.equal(p, before[n])
        elif n in regions:
            for kind, was in state[n].items():
                # momentum that went on outside would move the weights as soon as a larger size is trained
                now, kept = _state(optimizer, p)[kind], regions[n]
                assert torch.equal(now[kept], was[kept]) and not torch.equal(now[~kept], was[~kept]), (n, kind)
                remembered += 1
            assert torch.equal(p[regions[n]], before[n][regions[n]])
            x, y = p.detach(), before[n]
            for one in plan.slices[n]:
                x, y = one.of(x), one.of(y)
            assert not (x == y).all()
            moved += 1
    assert moved > 10 and remembered >= 2 * moved


def _state(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, torch.Tensor]:
    """What an optimiser remembers of each element."""
    return {k: t.clone() for k, t in optimizer.state[p].items() if isinstance(t, torch.Tensor) and t.shape == p.shape}


def test_nothing_is_outside_of_the_largest(model: PreTrainedModel) -> None:
    elastic = Elastic(model)
    small = uniform(elastic.anatomy, "x", [0], {"head": 1, "ff_chunk": 1})
    assert outside(elastic, [small, whole(elastic.anatomy)]) == {}
    wide = uniform(elastic.anatomy, "y", [0, 1], {"head": 3, "ff_chunk": 2})
    region = outside(elastic, [small, wide])["encoder.layers.0.feed_forward1.linear1.weight"]
    assert region.float().mean() == 0.5  # two of four chunks are in neither
