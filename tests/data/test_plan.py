"""The epoch plan: every utterance once, on any number of ranks, from written-down facts alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.data.buckets import Bins, duration_bins, sizes_for
from manyvoice.data.plan import Plan, check_ranks, share
from manyvoice.errors import UsageError
from manyvoice.types import Seconds


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    durations = np.asarray(draw(st.lists(st.floats(0.1, 30.0), min_size=1, max_size=80)))
    bins = duration_bins(durations, draw(st.integers(1, 8)))
    sizes = tuple(draw(st.integers(1, 9)) for _ in bins.edges)
    return Plan(corpus="c", bin_N=bins.assign(durations), bins=bins, sizes=sizes,
                accumulate=draw(st.integers(1, 4)), seed=draw(st.integers(0, 5)))  # fmt: skip


@given(plan=plans(), epoch=st.integers(0, 3))
def test_every_utterance_comes_exactly_once(plan: Plan, epoch: int) -> None:
    steps = plan.epoch(epoch)
    seen = sorted(int(i) for step in steps for micro in step for i in micro)
    assert seen == list(range(len(plan.bin_N)))
    assert len(steps) == plan.steps_per_epoch


@given(plan=plans())
def test_a_step_is_of_one_bin_and_within_its_size(plan: Plan) -> None:
    for step in plan.epoch(0):
        bins = {int(plan.bin_N[i]) for micro in step for i in micro}
        assert len(bins) == 1
        assert len(step) <= plan.accumulate
        assert all(1 <= len(micro) <= plan.sizes[next(iter(bins))] for micro in step)


@given(plan=plans(), ranks=st.integers(1, 4))
def test_ranks_share_each_step_in_equal_rounds(plan: Plan, ranks: int) -> None:
    for step in plan.epoch(1):
        shares = [share(step, rank, ranks) for rank in range(ranks)]
        assert len({len(s) for s in shares}) == 1
        counted = sorted(int(i) for s in shares for micro, counts in s if counts for i in micro)
        assert counted == sorted(int(i) for micro in step for i in micro)


def plan_of(**changes: Any) -> Plan:
    bin_N = np.arange(40) % 2
    return replace(Plan(corpus="c", bin_N=bin_N, bins=Bins((1.0, 2.0)), sizes=(4, 2), accumulate=2, seed=0), **changes)


def test_the_order_is_a_pure_function_and_changes_with_the_epoch() -> None:
    def order(plan: Plan, epoch: int) -> list[int]:
        return [int(i) for step in plan.epoch(epoch) for micro in step for i in micro]

    assert order(plan_of(), 0) == order(plan_of(), 0)
    assert len({tuple(order(plan_of(), e)) for e in range(4)} | {tuple(order(plan_of(seed=1), 0))}) == 5


@pytest.mark.parametrize(
    "change",
    [{"corpus": "d"}, {"seed": 1}, {"accumulate": 4}, {"sizes": (4, 3)}, {"bins": Bins((1.0, 2.5))},
     {"bin_N": 1 - np.arange(40) % 2}],
)  # fmt: skip
def test_the_fingerprint_sees_everything(change: dict[str, Any]) -> None:
    assert plan_of(**change).fingerprint != plan_of().fingerprint == plan_of().fingerprint


def test_ranks_that_do_not_divide_are_refused_with_those_that_do() -> None:
    check_ranks(6, 3)
    with pytest.raises(UsageError, match="4 ranks cannot share the 6 micro-batches .* start 1 or 2 or 3 or 6, or set"):
        check_ranks(6, 4)


def test_settings_that_make_no_plan_are_refused() -> None:
    with pytest.raises(UsageError, match=r"batch\.accumulate = 0"):
        plan_of(accumulate=0)
    with pytest.raises(UsageError, match="3 batch sizes for 2 bins"):
        plan_of(sizes=(1, 2, 3))


@given(durations=st.lists(st.floats(0.05, 40.0), min_size=1, max_size=200), bins=st.integers(1, 12))
def test_bins_cover_the_corpus_in_order(durations: list[float], bins: int) -> None:
    found = duration_bins(np.asarray(durations), bins)
    assert 1 <= len(found) <= bins
    assert list(found.edges) == sorted(set(found.edges))
    assert found.edges[-1] == max(durations)
    for duration, b in zip(durations, found.assign(np.asarray(durations)), strict=True):
        assert duration <= found.edges[b] and (b == 0 or duration > found.edges[b - 1])


def test_bins_hold_about_equal_audio() -> None:
    durations = np.random.default_rng(0).lognormal(1.0, 0.6, 20_000)
    bins = duration_bins(durations, 10)
    held = np.bincount(bins.assign(durations), weights=durations)
    assert held.max() / held.min() < 1.02


def test_sizes_fill_the_seconds_and_are_never_none() -> None:
    assert sizes_for(Bins((2.0, 7.0, 90.0)), Seconds(60.0)) == (30, 8, 1)


def test_bins_of_another_corpus_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the bins end at 2\.000 s but an utterance lasts 3\.000 s"):
        Bins((1.0, 2.0)).assign(np.array([3.0]))
    with pytest.raises(UsageError, match="the corpus is empty"):
        duration_bins(np.array([]), 3)
