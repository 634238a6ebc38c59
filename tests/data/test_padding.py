"""The padding meter counts tensors, and its sums do not depend on when a run was resumed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyvoice.data.padding import PaddingMeter, Waste, careless_padding, padding_of
from manyvoice.types import Batch


def batch_of(frames: list[int], tokens: list[int]) -> Batch:
    B = len(frames)
    return Batch(
        ids=tuple(map(str, range(B))), features_BTF=torch.zeros(B, max(frames), 4), len_B=torch.tensor(frames),
        tokens_BU=torch.zeros(B, max(tokens), dtype=torch.int64), token_len_B=torch.tensor(tokens),
        owner_B=torch.zeros(B), label_B=torch.zeros(B), seconds_B=torch.tensor(frames) / 100,
    )  # fmt: skip


def test_frames_and_tokens_are_counted_apart() -> None:
    found = padding_of(batch_of([10, 30, 20], [5, 1, 3]))
    assert (found["frames"], found["padded_frames"]) == (60.0, 90.0)
    assert (found["label_tokens"], found["padded_tokens"]) == (9.0, 15.0)
    waste = Waste().plus({**found, "seconds": 2.0})
    assert waste.frame_padding == pytest.approx(1 / 3)
    assert waste.token_padding == pytest.approx(0.4)


def test_nothing_wastes_nothing() -> None:
    assert (Waste().frame_padding, Waste().token_padding) == (0.0, 0.0)


def line(epoch: float, cell: int, frames: float = 8.0) -> dict[str, float]:
    return {"epoch": epoch, "cell": cell, "frames": frames, "padded_frames": 10.0, "seconds": 1.0}


def test_an_epochs_last_step_belongs_to_it() -> None:
    meter = PaddingMeter([line(0.5, 0), line(1.0, 1), line(1.5, 0), line(2.0, 1, 4.0)])
    assert meter.epochs() == [0, 1]
    assert [meter.total(e).steps for e in (0, 1)] == [2, 2]
    assert meter.total(1).frame_padding == pytest.approx(0.4)
    assert meter.total().frame_padding == pytest.approx(0.3)
    assert {c: w.steps for c, w in meter.by_cell().items()} == {0: 2, 1: 2}
    assert meter.by_cell(1)[1].frame_padding == pytest.approx(0.6)


def test_rows_of_a_batch_are_padded_no_more_than_they_need() -> None:
    batch = batch_of([10, 30, 20], [5, 1, 3])
    part = batch.rows(1, 3)
    assert (part.features_BTF.shape, part.tokens_BU.shape, part.ids) == ((2, 30, 4), (2, 3), ("1", "2"))
    assert batch.rows(0, 3) is batch


def test_random_batches_pad_to_their_longest() -> None:
    assert careless_padding(np.full(40, 3.0), 4) == pytest.approx(0.0)
    assert careless_padding(np.asarray([1.0, 3.0]), 2) == pytest.approx(1 - 4 / 6)
    durations = np.random.default_rng(0).lognormal(0, 0.8, 5000)
    assert 0.5 < careless_padding(durations, 16) < 0.8
