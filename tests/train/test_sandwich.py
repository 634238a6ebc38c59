"""A supernet's step: gradients are the sum of its subnets' alone, the statistics are the largest's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from manyvoice.config import make_run
from manyvoice.elastic.distill import adaptive_alpha, frames_distilled, kl
from manyvoice.elastic.extract import extract
from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.sampling import Alone, Sandwich
from manyvoice.elastic.sizes import Grid, nested_sizes
from manyvoice.elastic.still import outside
from manyvoice.models.batchnorm import masked_norms
from manyvoice.models.load import build_model, fingerprint
from manyvoice.recipes.ready import passes_of as passes_for
from manyvoice.train.distributed import start
from manyvoice.train.flatstart import flat_ctc, flat_ctc_of, said
from manyvoice.train.objective import ctc_per_utterance, one_pass, scores_of
from manyvoice.train.optim import build_optimizer
from manyvoice.train.sandwich import SupernetPasses
from manyvoice.train.schedule import build_schedule
from manyvoice.train.step import Place, PlainStep
from manyvoice.types import Batch

SETTINGS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "subsampling_conv_channels": 8}  # fmt: skip


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return build_model("tiny", SETTINGS, vocabulary=9, blank=8)[0].double()


@pytest.fixture
def batch(ragged: Callable[..., Batch]) -> Batch:
    return ragged([60, 44], [[1, 2, 3], [4, 5]])


def passes_of(
    model: Any, *, sampler: Any = None, distill: str = "alpha", hard: float = 0.5, weight: float = 1.0
) -> SupernetPasses:
    elastic = Elastic(model)
    sizes = nested_sizes(Grid(model, elastic.family), [1.0, 0.6, 0.3])
    sampler = sampler(sizes, seed=0) if sampler else Sandwich(sizes, seed=0, others=2)
    how: Any = distill
    return SupernetPasses(elastic, sampler, distill=how, hard=hard, dropout=True, weight=weight)


def gradients(model: Any, passes: SupernetPasses, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model.train()
    for loss in passes(model, batch, 5):
        loss.total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("distill", "hard", "weight"), [("alpha", 0.5, 1.0), ("kl", 0.0, 1.0), ("none", 0.5, 1.0), ("alpha", 0.0, 0.3)]
)
def test_the_gradient_is_the_sum_over_the_subnets(
    model: Any, batch: Batch, distill: str, hard: float, weight: float
) -> None:
    passes = passes_of(model, distill=distill, hard=hard, weight=weight)
    found = gradients(model, passes, batch)
    model.zero_grad(set_to_none=True)
    scores = scores_of(model, batch)
    flat_ctc_of(scores, batch, 8).total.backward()
    teacher, mask = scores.x.detach(), scores.mask_BT()
    share_B = torch.ones(2) if distill == "none" else said(teacher, mask, 8, batch.token_len_B)
    assert share_B.all(), "the teacher must say something, or this shows nothing"
    for drawn in passes.sampler.draw(5)[1:]:
        with passes.elastic.at(drawn.subnet, dropout=True):
            scores = scores_of(model, batch)
            share = 1.0 if distill == "none" else hard
            total = share * ctc_per_utterance(scores, batch.tokens_BU, batch.token_len_B, 8)
            if distill != "none":
                how = adaptive_alpha if distill == "alpha" else kl
                total = total + (1 - share) * frames_distilled(how, teacher, scores.x, scores.mask_BT())
            (weight * (share_B * total).sum()).backward()
    for n, p in model.named_parameters():
        assert (p.grad is None) == (n not in found)
        if p.grad is not None:
            torch.testing.assert_close(found[n], p.grad, rtol=1e-10, atol=1e-12)


def test_dropout_of_a_narrow_part_follows_its_width(model: Any, batch: Batch) -> None:
    """Rates that the modules have while each subnet of a step runs: the whole's for the first, less for the others."""
    passes, rates = passes_of(model, distill="none"), list[float]()
    for module in model.modules():
        if hasattr(module, "activation_dropout"):
            module.activation_dropout = 0.4
    first = model.encoder.layers[0].feed_forward1
    first.register_forward_hook(lambda module, x, y: rates.append(module.activation_dropout))
    gradients(model, passes, batch)
    plans = [passes.elastic.plan(drawn.subnet) for drawn in passes.sampler.draw(5)]
    kept = [plan.counts.get(("encoder.layers.0.feed_forward1", "ff_chunk"), (1, 1)) for plan in plans]
    assert rates == [pytest.approx(0.4 * k / n) for k, n in kept] and rates[-1] < rates[0] == 0.4


def test_statistics_are_those_of_the_largest(model: Any, batch: Batch) -> None:
    gradients(model, passes_of(model), batch)
    assert all(len(norm.pending) == 1 and norm.recording for norm in masked_norms(model))


def step_of(model: Any, passes: Any) -> PlainStep:
    optimizer = build_optimizer(model.named_parameters(), "adamw", 1e-2, 0.1, (0.9, 0.98), 1e-8)
    schedule = build_schedule("constant", lr=1e-2, total_steps=9, warmup_steps=0, eden_steps=1.0, eden_epochs=1.0)
    step = PlainStep(model, passes, optimizer, schedule, start("fp64", cpu=True), clip=None, seed=0)
    if isinstance(passes, SupernetPasses):
        step.around_update = passes.around_update(optimizer)
    return step


def test_a_step_logs_the_subnets_loss_a_token(model: Any, batch: Batch) -> None:
    log = step_of(model, passes_of(model))([batch], Place())
    assert log["loss_subnets"] > 0 and log["tokens"] == 5
    assert log["loss"] == pytest.approx(float(flat_ctc(build_again(), batch).total.detach()) / 5, rel=1e-6)


def build_again() -> Any:
    torch.manual_seed(0)
    return build_model("tiny", SETTINGS, vocabulary=9, blank=8)[0].double().train()


def test_one_size_a_step_trains_as_if_it_were_alone(model: Any, batch: Batch) -> None:
    """Without the sandwich, whatever a step's subnet lacks does not move: the rest goes as in a model of that size."""
    passes = passes_of(model, sampler=Alone, distill="none")
    step = next(s for s in range(50) if passes.sampler.draw(s)[0].subnet.name == "30")
    subnet = passes.sampler.draw(step)[0].subnet
    alone = extract(passes.elastic, subnet)
    step_of(alone, one_pass(flat_ctc))([batch], Place(step=step))
    step_of(model, passes)([batch], Place(step=step))
    again = extract(passes.elastic, subnet)
    for (n, p), q in zip(alone.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=n)


def test_growing_trains_the_smallest_as_if_it_were_alone_and_moves_nothing_else(model: Any, batch: Batch) -> None:
    """Weights and running statistics of three steps, momentum, decay and all."""
    passes = passes_of(model, sampler=partial(Sandwich, alone=3), distill="none")
    smallest = passes.sampler.sizes[-1]
    alone, before = extract(passes.elastic, smallest), copy.deepcopy(model.state_dict())
    small, whole = step_of(alone, one_pass(flat_ctc)), step_of(model, passes)
    for step in range(3):
        small([batch], Place(step=step))
        whole([batch], Place(step=step))
    again = extract(passes.elastic, smallest).state_dict()
    assert any("running_mean" in name for name in again)
    for name, x in alone.state_dict().items():
        # in front of a batch norm a bias has no gradient but rounding, which AdamW divides by 1e-8
        within = 1e-6 if "depthwise_conv.bias" in name or "conv.norm.running_mean" in name else 1e-11
        torch.testing.assert_close(x, again[name], rtol=1e-9, atol=within, msg=name)
    masks, dropped = outside(passes.elastic, [smallest]), 0
    for name, p in model.named_parameters():
        layer = name.removeprefix("encoder.layers.").split(".")[0]
        if layer.isdigit() and int(layer) not in passes.elastic.plan(smallest).layers:
            dropped += 1
            assert torch.equal(p, before[name]), name
        elif name in masks:
            assert torch.equal(p[masks[name]], before[name][masks[name]]), name
    assert dropped and masks


def test_memory_that_runs_out_in_a_subnet_leaves_a_whole_model(model: Any, batch: Batch) -> None:
    passes = passes_of(model)
    before = fingerprint(model)
    calls = [0]

    def failing(net: Any, part: Batch, step: int) -> Any:
        for loss in passes(net, part, step):
            calls[0] += 1
            if calls[0] == 2:
                raise MemoryError("out of memory")
            yield loss

    with pytest.raises(Exception, match="memory"):
        step_of(model, failing)([batch.rows(0, 1)], Place())
    assert fingerprint(model) == before and len([*model.encoder.layers]) == 2


def test_subnets_wait_for_a_teacher_that_says_something(model: Any, batch: Batch) -> None:
    with torch.no_grad():
        model.ctc_head.bias[8] = 50.0  # blanks only
    model.train()
    assert len(list(passes_of(model)(model, batch, 0))) == 1
    assert len(list(passes_of(model, distill="none")(model, batch, 0))) == 3


def test_the_front_end_runs_once_for_all_subnets(model: Any, batch: Batch) -> None:
    ran: list[int] = []
    inside = model.encoder.subsampling.linear.register_forward_hook(lambda *_: ran.append(1))
    passes = passes_of(model, distill="none")
    found = gradients(model, passes, batch)
    assert len(ran) == 1
    assert len(passes.sampler.draw(5)) == 3
    assert float(found["encoder.subsampling.linear.weight"].abs().sum()) > 0
    inside.remove()


def test_the_front_end_is_itself_again_after_a_step_that_stopped_halfway(model: Any, batch: Batch) -> None:
    model.train()
    losses = passes_of(model)(model, batch, 5)
    next(losses)
    assert "forward" in model.encoder.subsampling.__dict__
    losses.close()
    assert "forward" not in model.encoder.subsampling.__dict__


def test_the_smallest_trains_alone_before_the_others_grow_from_it(model: Any) -> None:
    config = make_run({"output": "o", "corpus": {"train": "a"}, "elastic": {"sizes": [1.0, 0.6, 0.3], "grow": 0.5}})
    passes: Any = passes_for(model, config, 8)
    roles = [[drawn.role for drawn in passes.sampler.draw(step)] for step in range(8)]
    assert roles == [["smallest"]] * 4 + [["largest", "other", "smallest"]] * 4
    every: Any = passes_for(model, config)
    assert len(every.sampler.draw(0)) == 3, "memory is measured with all of them"


def test_no_size_is_trained_twice_in_a_step(model: Any) -> None:
    sizes = nested_sizes(Grid(model, Elastic(model).family), [1.0, 0.8, 0.5, 0.3])
    between = [[d.subnet.name for d in Sandwich(sizes, seed=1, others=4).draw(step)[1:-1]] for step in range(20)]
    assert all(sorted(names) == ["50", "80"] for names in between)
    assert len(set(map(tuple, between))) > 1, "in any order"
    # nor is one that a random draw gives and a named one after it, or two random ones
    mixed = Sandwich(sizes, seed=1, others=4, named=0.5, grid=Grid(model, Elastic(model).family))
    for step in range(200):
        kept = [d.subnet.kept for d in mixed.draw(step)]
        assert len(kept) == len(set(kept)) > 2
    two = Sandwich(nested_sizes(Grid(model, Elastic(model).family), [1.0, 0.3]), seed=1)
    assert {tuple(d.role for d in two.draw(step)) for step in range(9)} == {("largest", "smallest")}
