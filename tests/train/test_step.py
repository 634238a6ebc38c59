"""The objective and the step, against enumeration and one big batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyvoice.errors import WorkError
from manyvoice.models import batchnorm
from manyvoice.models.parakeet import FAMILY, PRESETS
from manyvoice.train.distributed import start
from manyvoice.train.loop import fit
from manyvoice.train.objective import Loss, ctc, ctc_per_utterance, one_pass
from manyvoice.train.optim import build_optimizer
from manyvoice.train.schedule import build_schedule
from manyvoice.train.step import Place, PlainStep, stream_seed
from manyvoice.types import Batch, Padded

V, BLANK = 4, 3
SETTINGS = dict(PRESETS["tiny"]) | {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "subsampling_conv_channels": 4,
}


def by_enumeration(logp_TV: Tensor, tokens: list[int]) -> float:
    """-log of the summed probability of every path that collapses to the tokens."""
    T = len(logp_TV)
    total = 0.0
    for path in itertools.product(range(V), repeat=T):
        collapsed = [k for k, _ in itertools.groupby(path) if k != BLANK]
        if collapsed == tokens:
            total += math.exp(sum(float(logp_TV[t, k]) for t, k in enumerate(path)))
    return -math.log(total)


@pytest.mark.parametrize("tokens", [[], [0], [1, 1], [0, 2, 0]])
def test_ctc_is_the_sum_over_all_paths(tokens: list[int]) -> None:
    scores = Padded(x=torch.randn(1, 5, V, dtype=torch.float64), len_B=torch.tensor([5]))
    labels = torch.tensor([tokens or [0]])
    loss = ctc_per_utterance(scores, labels, torch.tensor([len(tokens)]), BLANK)
    assert float(loss[0]) == pytest.approx(by_enumeration(scores.x[0].log_softmax(-1), tokens), abs=1e-12)


def batch_of(frames: list[int], tokens: list[list[int]], seed: int = 0) -> Batch:
    gen = torch.Generator().manual_seed(seed)
    B, T, U = len(frames), max(frames), max(map(len, tokens))
    x = torch.randn(B, T, 80, generator=gen, dtype=torch.float64)
    labels = torch.zeros(B, U, dtype=torch.int64)
    for b, row in enumerate(tokens):
        labels[b, : len(row)] = torch.tensor(row)
        x[b, frames[b] :] = 0
    return Batch(
        ids=tuple(f"u{b}" for b in range(B)), features_BTF=x, len_B=torch.tensor(frames), tokens_BU=labels,
        token_len_B=torch.tensor([len(t) for t in tokens]), owner_B=torch.zeros(B, dtype=torch.int64),
        label_B=torch.full((B,), -1), seconds_B=torch.tensor(frames, dtype=torch.float64) / 100,
    )  # fmt: skip


def step_of(model: Any, **options: Any) -> PlainStep:
    optimizer = build_optimizer(model.named_parameters(), "adamw", 1e-3, 0.0, (0.9, 0.98), 1e-8)
    schedule = build_schedule("constant", lr=1e-3, total_steps=10, warmup_steps=0)
    return PlainStep(model, one_pass(ctc), optimizer, schedule, start("fp32", cpu=True), clip=None, seed=0, **options)


def gradients(model: Any, micro: list[Batch]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the optimiser is given."""
    step = step_of(model)
    found: dict[str, Tensor] = {}

    def keep(*_: Any, **__: Any) -> None:
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    step.optimizer.step = keep  # type: ignore[method-assign, assignment]
    return found, step(micro, Place())


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    built = FAMILY.build(SETTINGS, vocabulary=V, blank=BLANK).double()
    batchnorm.freeze(built)  # batch statistics are of a micro-batch, so only frozen ones do not see the cut
    return built


WHOLE = batch_of([40, 36, 20, 52, 28], [[0, 1], [2], [1, 1, 0], [0, 2, 1, 0], [2, 2]])


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(1, 4), max_size=3, unique=True))
def test_the_gradient_does_not_depend_on_the_cut(model: Any, cuts: list[int]) -> None:
    expected, log = gradients(model, [WHOLE])
    edges = [0, *sorted(cuts), 5]
    found, cut_log = gradients(model, [WHOLE.rows(a, b) for a, b in itertools.pairwise(edges)])
    same_gradients(found, expected)
    assert cut_log["loss"] == pytest.approx(log["loss"], rel=1e-12)
    assert cut_log["utterances"] == 5


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=1e-10, msg=name)


def test_the_loss_is_nats_per_token(model: Any) -> None:
    _, log = gradients(model, [WHOLE])
    model.train()
    loss = ctc(model, WHOLE)
    assert log["loss"] == pytest.approx(float(loss.total.detach()) / 12, rel=1e-12)
    assert log["tokens"] == 12


def test_what_cannot_be_aligned_is_counted_and_moves_nothing(model: Any) -> None:
    batch = batch_of([8, 40], [[0, 0, 0, 0], [1]])  # two encoder frames for four equal labels
    found, log = gradients(model, [batch])
    alone, _ = gradients(model, [batch.rows(1, 2)])
    assert log["unaligned"] == 1
    for name, gradient in alone.items():
        torch.testing.assert_close(found[name] * 5, gradient, atol=1e-12, rtol=1e-9, msg=name)


def test_a_loss_that_is_not_finite_names_the_batch(model: Any) -> None:
    batch = batch_of([40], [[0]])
    batch.features_BTF[0, 0, 0] = float("nan")
    with pytest.raises(WorkError, match=r"the loss is nan at step 0 on u0; resume"):
        step_of(model)([batch], Place())


def test_a_gradient_that_is_not_finite_is_never_applied(model: Any) -> None:
    """Also where nothing is clipped, as with ScaledAdam."""

    step = step_of(model)

    def objective(net: Any, batch: Batch) -> Loss:
        loss = ctc(net, batch)
        nothing = (next(net.parameters()).sum() * 0).sqrt()  # a root of nothing has no slope
        return Loss(loss.total + nothing, loss.weight)

    step.passes = one_pass(objective)
    with torch.no_grad():
        before = [p.clone() for p in model.parameters()]
    with pytest.raises(WorkError, match=r"the gradient is nan at step 0 on u0"):
        step([batch_of([40], [[0]])], Place())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_streams_of_random_numbers_differ_by_everything() -> None:
    seeds = {stream_seed(a, b, c) for a in range(3) for b in range(3) for c in range(3)}
    assert len(seeds) == 27


def test_the_loop_counts_steps_and_epochs_and_stops_when_told() -> None:
    places = []

    def step(micro: Any, place: Place) -> dict[str, float]:
        places.append((place.step, place.epoch, place.index, micro))
        return {}

    def batches(epoch: int, first: int) -> list[Any]:
        return [f"{epoch}.{i}" for i in range(first, 3)]

    place = Place(step=4, epoch=1, index=1, steps_of=lambda epoch: 3)
    lines = list(fit(step, batches, place, epochs=3))
    assert [p[3] for p in places] == ["1.1", "1.2", "2.0", "2.1", "2.2"]
    assert [line["step"] for line in lines] == [5, 6, 7, 8, 9]
    assert (place.epoch, place.index) == (3, 0)
    stop: Callable[[], bool] = lambda: True  # noqa: E731
    assert len(list(fit(step, batches, Place(steps_of=lambda epoch: 3), epochs=9, stop=stop))) == 1
