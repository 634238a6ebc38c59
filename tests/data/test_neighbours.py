"""Batches of neighbours: each utterance once, never too many at once, little padding, other mates in each epoch."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.data.neighbours import neighbourhoods

PAIRS = st.lists(st.tuples(st.floats(0.05, 60.0), st.integers(0, 300)), min_size=1, max_size=120)


def room(seconds: float):  # type: ignore[no-untyped-def]
    return lambda d, u: np.maximum(1, (seconds / (d + 0.002 * d**2 + 0.01 * u)).astype(int))


@given(pairs=PAIRS, seconds=st.floats(1.0, 400.0), seed=st.integers(0, 3))
def test_every_utterance_once_and_within_capacity(pairs: list[tuple[float, int]], seconds: float, seed: int) -> None:
    durations, tokens = map(np.asarray, zip(*pairs, strict=True))
    capacity = room(seconds)
    batches = neighbourhoods(durations, tokens, capacity, np.random.default_rng(seed))
    assert sorted(int(i) for b in batches for i in b) == list(range(len(pairs)))
    for b in batches:
        assert 1 <= len(b) <= capacity(durations[b].max(keepdims=True), tokens[b].max(keepdims=True))[0]
    again = neighbourhoods(durations, tokens, capacity, np.random.default_rng(seed))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_no_utterances_make_no_batches() -> None:
    assert neighbourhoods(np.array([]), np.array([]), room(9.0), np.random.default_rng(0)) == []


def long_tailed(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    durations = np.clip(rng.lognormal(np.log(4), 0.8, n), 0.5, 40)
    return durations, np.ceil(durations * np.exp(rng.normal(np.log(3.5), 0.35, n))).astype(np.int64)


def test_neighbours_pad_little_in_both_directions() -> None:
    durations, tokens = long_tailed(40_000)
    batches = neighbourhoods(durations, tokens, room(300.0), np.random.default_rng(0))
    frames = durations.sum() / sum(len(b) * durations[b].max() for b in batches)
    labels = tokens.sum() / sum(len(b) * tokens[b].max() for b in batches)
    assert 1 - frames < 0.05
    assert 1 - labels < 0.12
    # one outlier that every batch must make room for would show in how full they are
    full = [len(b) / room(300.0)(durations[b].max(keepdims=True), tokens[b].max(keepdims=True))[0] for b in batches]
    assert np.mean(full) > 0.9


def test_consecutive_batches_are_alike() -> None:
    """A step of several micro-batches is of consecutive ones, and its ranks should not wait for each other."""
    durations, tokens = long_tailed(40_000)
    batches = neighbourhoods(durations, tokens, room(300.0), np.random.default_rng(0))
    longest = np.asarray([durations[b].max() for b in batches])
    assert np.abs(np.diff(np.log(longest))).mean() < 0.1


def test_mates_change_from_epoch_to_epoch() -> None:
    durations, tokens = long_tailed(20_000)
    homes = []
    for epoch in range(2):
        batches = neighbourhoods(durations, tokens, room(200.0), np.random.default_rng([0, epoch]))
        home = np.empty(20_000, dtype=int)
        for k, b in enumerate(batches):
            home[b] = k
        homes.append((batches, home))
    rng = np.random.default_rng(1)
    pairs = [rng.choice(b, 2, replace=False) for b in homes[0][0] if len(b) > 1]
    assert np.mean([homes[1][1][a] == homes[1][1][b] for a, b in pairs]) < 0.5
