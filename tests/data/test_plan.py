"""The epoch plan: every utterance once, on any number of ranks, from written-down facts alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.data.buckets import NOWHERE, Bins, plane_bins, seconds_for_updates, sizes_for
from manyvoice.data.plan import Plan, check_ranks, share
from manyvoice.errors import UsageError
from manyvoice.types import Seconds

PAIRS = st.lists(st.tuples(st.floats(0.1, 30.0), st.integers(0, 90)), min_size=1, max_size=80)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    durations, tokens = map(np.asarray, zip(*draw(PAIRS), strict=True))
    bins = plane_bins(durations, tokens, draw(st.integers(1, 8)), draw(st.integers(1, 3)))
    sizes = tuple(draw(st.integers(1, 9)) for _ in bins.cells)
    return Plan(corpus="c", durations_N=durations, tokens_N=tokens, bins=bins, sizes=sizes,
                accumulate=draw(st.integers(1, 4)), seed=draw(st.integers(0, 5)),
                layout=draw(st.sampled_from(["bins", "neighbourhood"])))  # fmt: skip


@given(plan=plans(), epoch=st.integers(0, 3))
def test_every_utterance_comes_exactly_once(plan: Plan, epoch: int) -> None:
    steps = plan.epoch(epoch)
    seen = sorted(int(i) for step in steps for micro in step for i in micro)
    assert seen == list(range(len(plan)))
    assert len(steps) == plan.steps(epoch)


@given(plan=plans(), epoch=st.integers(0, 2))
def test_a_micro_batch_is_within_the_size_of_its_cell(plan: Plan, epoch: int) -> None:
    for step in plan.epoch(epoch):
        assert len(step) <= plan.accumulate
        assert all(1 <= len(micro) <= plan.rooms[plan.cell_of(micro, epoch)] for micro in step)
        if plan.layout == "bins":
            assert len({int(plan.cells(epoch)[i]) for micro in step for i in micro}) == 1


@given(plan=plans(), ranks=st.integers(1, 4))
def test_ranks_share_each_step(plan: Plan, ranks: int) -> None:
    for step in plan.epoch(1):
        shares = [share(step, rank, ranks) for rank in range(ranks)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        taken = sorted(int(i) for s in shares for micro in s for i in micro)
        assert taken == sorted(int(i) for micro in step for i in micro)


@given(plan=plans(), changes=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=6))
def test_another_number_of_ranks_goes_on_where_the_last_one_stopped(plan: Plan, changes: list[int]) -> None:
    """Whatever number ran each step, the epoch's utterances are seen once each: 1 -> 2 -> 1 in mid-epoch and more."""
    seen: list[int] = []
    for place, step in enumerate(plan.epoch(2)):
        ranks = changes[place % len(changes)]
        fresh = replace(plan)  # a resumed process has nothing but what is written down
        step = fresh.epoch(2)[place]
        seen += [int(i) for rank in range(ranks) for micro in share(step, rank, ranks) for i in micro]
    assert sorted(seen) == list(range(len(plan)))


def plan_of(**changes: Any) -> Plan:
    durations = np.tile([0.5, 1.5], 20)
    plan = Plan(corpus="c", durations_N=durations, tokens_N=np.full(40, 3), bins=Bins(((1.0, 9), (2.0, 9))),
                sizes=(4, 2), accumulate=2, seed=0)  # fmt: skip
    return replace(plan, **changes)


def test_the_order_is_a_pure_function_and_changes_with_the_epoch() -> None:
    def order(plan: Plan, epoch: int) -> list[int]:
        return [int(i) for step in plan.epoch(epoch) for micro in step for i in micro]

    assert order(plan_of(), 0) == order(plan_of(), 0)
    assert len({tuple(order(plan_of(), e)) for e in range(4)} | {tuple(order(plan_of(seed=1), 0))}) == 5


def test_every_step_is_as_likely_to_be_first_whatever_its_bin() -> None:
    """A known sampler draws its longest bin twice as often as the others, and bins alike whatever they hold."""
    durations = np.repeat([0.5, 1.5, 2.5], [80, 40, 8])
    bins = Bins(((1.0, 9), (2.0, 9), (3.0, 9)))
    plan = plan_of(durations_N=durations, tokens_N=np.full(128, 3), bins=bins, sizes=(4, 4, 4), accumulate=1)
    first = [plan.cell_of(plan.epoch(e)[0][0], e) for e in range(1500)]
    share_of = np.bincount(first, minlength=3) / len(first)
    expected = np.asarray([20, 10, 2]) / 32  # of the steps
    assert np.abs(share_of - expected).max() < 4 * np.sqrt(0.25 / len(first))


@pytest.mark.parametrize(
    "change",
    [{"corpus": "d"}, {"seed": 1}, {"accumulate": 4}, {"sizes": (4, 3)}, {"bins": Bins(((1.0, 9), (2.5, 9)))},
     {"durations_N": np.tile([0.6, 1.5], 20)}, {"tokens_N": np.full(40, 4)}, {"layout": "neighbourhood"}],
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
    with pytest.raises(UsageError, match="in ascending order, each once"):
        Bins(((2.0, 5), (1.0, 5)))
    with pytest.raises(UsageError, match="at least one of each"):
        plane_bins(np.array([1.0]), np.array([1]), 0)


def test_played_at_another_speed_an_utterance_is_of_another_bin() -> None:
    plan = plan_of(bins=Bins(((1.0, 9), (2.0, 9), (3.1, 9))), sizes=(4, 2, 2), tempo=lambda epoch: np.full(40, 0.5))
    assert plan.cells(0).tolist() == [0, 2] * 20
    assert sorted(int(i) for s in plan.epoch(0) for m in s for i in m) == list(range(40))
    assert plan.steps(0) == len(plan.epoch(0))


@given(pairs=PAIRS, bins=st.integers(1, 12), token_bins=st.integers(1, 4))
def test_bins_cover_the_corpus(pairs: list[tuple[float, int]], bins: int, token_bins: int) -> None:
    durations, tokens = map(np.asarray, zip(*pairs, strict=True))
    found = plane_bins(durations, tokens, bins, token_bins)
    assert len(found.edges) <= bins
    assert len(found) <= bins * token_bins + 1
    assert found.edges[-1] == max(durations)  # to the last bit: a rounded edge would leave the longest out
    for d, u, cell in zip(durations, tokens, found.assign(durations, tokens), strict=True):
        seconds, most = found.cells[cell]
        assert d <= seconds and u <= most
    strict = found.assign(durations, tokens, strict=True)
    inside = strict != NOWHERE
    assert np.array_equal(strict[inside], found.assign(durations, tokens)[inside])
    for d, cell in zip(durations[inside], strict[inside], strict=True):
        assert all(not (d <= edge < found.cells[cell][0]) for edge in found.edges)  # no shorter bin would do


def long_tailed(n: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    durations = rng.lognormal(1.0, 0.6, n)
    return durations, np.ceil(durations * rng.lognormal(1.2, 0.3, n)).astype(np.int64)


def test_bins_hold_about_equal_audio_and_cells_about_equal_tokens() -> None:
    durations, tokens = long_tailed()
    bins = plane_bins(durations, tokens, 10)
    held = [durations[(durations <= edge)].sum() for edge in bins.edges]
    assert max(np.diff([0.0, *held])) / min(np.diff([0.0, *held])) < 1.02
    cells = plane_bins(durations, tokens, 4, 2)
    strict = cells.assign(durations, tokens, strict=True)
    inside = strict != NOWHERE
    shares = np.bincount(strict[inside], weights=tokens[inside])
    for edge in cells.edges:
        first, second = [c for c in range(len(cells)) if cells.cells[c][0] == edge][:2]
        assert 0.7 < shares[first] / shares[second] < 1.4  # whole tokens: edges fall where they can


def test_a_fast_outlier_stretches_no_bin_but_keeps_its_place() -> None:
    durations, tokens = long_tailed(4000)
    tokens[0], durations[0] = 400, 1.0
    bins = plane_bins(durations, tokens, 6, 2)
    with_it_in_its_own = [t for s, t in bins.cells if s == bins.edges[np.searchsorted(bins.edges, 1.0)]]
    assert max(with_it_in_its_own) < 60
    assert bins.assign(durations, tokens, strict=True)[0] == NOWHERE
    assert bins.cells[bins.assign(durations, tokens)[0]] == (float(durations.max()), 400)


def test_utterances_that_all_speak_alike_make_bins() -> None:
    """Known estimators divide by the spread of the speaking rate, which is nothing here."""
    bins = plane_bins(np.full(50, 2.0), np.full(50, 7), 30, 2)
    assert bins.cells == ((2.0, 7),)
    half = plane_bins(np.repeat([1.0, 2.0], 50), np.repeat([5, 10], 50), 4, 2)
    assert half.cells == ((1.0, 5), (2.0, 10))


def test_bins_of_one_length_are_cut_by_tokens() -> None:
    """Where a corpus is cut into equal pieces, the duration bins fall together; their cells do not."""
    tokens = np.arange(1, 1001)
    bins = plane_bins(np.full(1000, 30.0), tokens, 5, 2)
    assert bins.edges == (30.0,)
    assert len(bins) == 10


def test_sizes_fill_the_seconds_and_are_never_none() -> None:
    assert sizes_for(Bins(((2.0, 5), (7.0, 5), (90.0, 5))), Seconds(60.0)) == (30, 8, 1)


@given(pairs=PAIRS, updates=st.integers(1, 60), accumulate=st.integers(1, 3))
def test_an_epoch_keeps_its_updates(pairs: list[tuple[float, int]], updates: int, accumulate: int) -> None:
    durations, tokens = map(np.asarray, zip(*pairs, strict=True))
    bins = plane_bins(durations, tokens, 4, 2)
    counts = np.bincount(bins.assign(durations, tokens), minlength=len(bins))
    seconds = seconds_for_updates(bins, counts, updates, accumulate=accumulate)
    sizes = (1,) * len(bins) if seconds is None else sizes_for(bins, seconds)
    plan = Plan(corpus="c", durations_N=durations, tokens_N=tokens, bins=bins, sizes=sizes, accumulate=accumulate)
    assert (plan.steps(0) < updates) == (seconds is None)


def test_bins_of_another_corpus_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the bins end at 2\.000 s and 5 tokens, but 1 .* of 3\.000 s with 4 tokens"):
        Bins(((1.0, 5), (2.0, 5))).assign(np.array([3.0]), np.array([4]))
    with pytest.raises(UsageError, match="1 utterances have no room"):
        Bins(((1.0, 5),)).assign(np.array([1.0]), np.array([6]))
    with pytest.raises(UsageError, match="the corpus is empty"):
        plane_bins(np.array([]), np.array([]), 3)
