"""Owners that train together end where each ends alone; visits, packing and stopping follow from the owner alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from manyvoice.errors import WorkError
from manyvoice.models.anatomy import anatomy_of, family_of
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.method import make_method
from manyvoice.train import owners as owners_module
from manyvoice.train.halfway import Halfway
from manyvoice.train.objective import ctc_per_utterance, scores_of
from manyvoice.train.owners import OwnerTraining, Schedule, Speech, packed, visit
from manyvoice.types import Batch, Seconds

OWNERS = ["ann", "bob", "cem", "dora"]


@pytest.fixture(scope="module")
def base(frozen_base: Callable[[int, int], PreTrainedModel]) -> PreTrainedModel:
    """Two layers."""
    return frozen_base(2, 1)


class Rows:
    """Stands for a corpus of 24 utterances and its collator."""

    def __init__(self) -> None:
        gen = torch.Generator().manual_seed(3)
        frames = [40 + 5 * (i % 7) for i in range(24)]
        self.durations_N = np.asarray(frames) / 100
        self.x = [torch.randn(f, 80, generator=gen, dtype=torch.float64) for f in frames]
        self.labels = [torch.randint(0, 8, (1 + i % 3,), generator=gen) for i in range(24)]
        self.corpus = self
        self.features = self.tokens = None

    def __call__(self, indices: Any, epoch: int = 0) -> Batch:
        x, labels = [self.x[i] for i in indices], [self.labels[i] for i in indices]
        zero = torch.zeros(len(x), dtype=torch.int64)
        return Batch(
            ids=tuple(map(str, indices)), features_BTF=pad_sequence(x, batch_first=True),
            len_B=torch.tensor([len(v) for v in x]), tokens_BU=pad_sequence(labels, batch_first=True),
            token_len_B=torch.tensor([len(v) for v in labels]), owner_B=zero, label_B=zero, seconds_B=zero.double(),
        )  # fmt: skip


SPEECH = [Speech(adapt=(0, 1, 2, 3), choose=(4,)), Speech(adapt=(5, 6), choose=(7, 8), replay=(20, 21, 22)),
          Speech(adapt=(9,), choose=(10,)), Speech(adapt=tuple(range(11, 18)), choose=(18, 19))]  # fmt: skip
SCHEDULE = Schedule(rounds=7, utterances=3, replayed=1, seconds=Seconds(2.0), lr=2e-2, every=2, patience=1)


def training(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, owners: list[str], *, method: str = "adapter",
    schedule: Schedule = SCHEDULE, lrs: tuple[float, ...] = (),
) -> OwnerTraining:  # fmt: skip
    rows = Rows()
    monkeypatch.setattr(owners_module, "Collator", lambda *_: rows)

    def loss(bank: Bank, batch: Batch) -> Tensor:
        with bank.on(base, batch.owner_B):
            scores = scores_of(base, batch)
        return ctc_per_utterance(scores, batch.tokens_BU, batch.token_len_B, family_of(base).blank(base))

    def losses(bank: Bank, batch: Batch, round: int) -> Iterator[Tensor]:
        yield loss(bank, batch)

    bank = Bank(anatomy_of(base), make_method(method), owners, dtype=torch.float64)
    speech = [SPEECH[OWNERS.index(o)] for o in owners]
    speech = [replace(s, lr=lr) for s, lr in zip(speech, lrs or [None] * len(speech), strict=True)]
    return OwnerTraining(bank, speech, rows, losses, loss, schedule)  # type: ignore[arg-type]


def choose(job: OwnerTraining) -> dict[int, tuple[int, ...]]:
    return {row: said.choose for row, said in enumerate(job.speech, start=1)}


def test_a_bank_of_four_is_four_runs(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step for step, early stopping and the best so far included."""
    together = training(base, monkeypatch, OWNERS)
    best = together.run()
    assert len({b.round for b in best.values()}) > 1, "owners that all stop together would show nothing"
    for row, owner in enumerate(OWNERS, start=1):
        alone = training(base, monkeypatch, [owner])
        (found,) = alone.run().values()
        assert found.round == best[row].round
        np.testing.assert_allclose(found.history, best[row].history, rtol=1e-9)
        for where, p in alone.bank.tensors.items():
            torch.testing.assert_close(p[1], together.bank.tensors[where][row], rtol=1e-8, atol=1e-9)


def test_an_owner_is_the_best_it_has_been(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    job = training(base, monkeypatch, OWNERS)
    best = job.run()
    for row, nats in job.nats_of(choose(job)).items():
        assert nats == pytest.approx(min(n for _, n in best[row].history), rel=1e-12)
        assert nats == pytest.approx(best[row].nats, rel=1e-12)


def test_owners_may_have_rates_of_their_own(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    job = training(base, monkeypatch, OWNERS, lrs=(0.0, 1e-2, 0.0, 1e-2))
    start = training(base, monkeypatch, OWNERS).bank
    job.run()
    moved = [any(not torch.equal(p[r], start.tensors[w][r]) for w, p in job.bank.tensors.items()) for r in range(5)]
    assert moved == [False, False, True, False, True]


@pytest.mark.parametrize("method", ["generated", "mixture"])
def test_owners_that_share_learn_together(method: str, base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    job = training(base, monkeypatch, OWNERS, method=method, schedule=Schedule(
        rounds=12, utterances=3, seconds=Seconds(9.0), lr=2e-2, shared_lr=1e-2, every=3, patience=9))  # fmt: skip
    before = {where: p.clone() for where, p in job.bank.shared.items()}
    first = job.nats_of(choose(job))
    job.run()
    assert sum(job.nats_of(choose(job)).values()) < sum(first.values())
    assert any(not torch.equal(p, before[where]) for where, p in job.bank.shared.items())


def test_a_loss_that_is_not_finite_names_the_owner(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    job = training(base, monkeypatch, OWNERS)
    with torch.no_grad():
        job.bank.parameters()[0][2] = float("nan")
    alone = training(base, monkeypatch, ["ann"])
    alone.run()
    job.run()
    assert job.lost == {2: 0} and 2 not in job.active
    for where, p in alone.bank.tensors.items():
        torch.testing.assert_close(job.bank.tensors[where][1], p[1], rtol=0, atol=1e-10, msg="in other company")
    with torch.no_grad():
        alone.bank.parameters()[0][1] = float("nan")
    last = OwnerTraining(alone.bank, alone.speech, alone.collator, alone.losses, alone.nats, alone.schedule)
    last.run()
    assert last.lost == {1: 0}, "alone in a wave of a larger job it is lost as it is in company"
    with pytest.raises(WorkError, match="the loss of ann is not finite in round 0"):
        last.raise_if_all_lost()
    job.raise_if_all_lost()


def test_owners_that_share_stop_together_at_a_loss_that_is_not_finite(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training(base, monkeypatch, OWNERS, method="generated")
    with torch.no_grad():
        job.bank.parameters()[0][2] = float("nan")
    with pytest.raises(WorkError, match="the loss of bob is not finite in round 0"):
        job.run()


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 5))
def test_all_utterances_come_before_any_a_second_time(n: int, count: int, seed: int) -> None:
    rows = list(range(100, 100 + n))
    taken = [i for r in range(4) for i in visit(seed, "x", r, rows, count)]
    for start in range(0, len(taken) - n + 1, n):
        assert sorted(taken[start : start + n]) == rows
    assert all(len(visit(seed, "x", r, rows, count)) == min(n, count) for r in range(4))


@given(st.lists(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=4), min_size=1, max_size=12))
def test_packing_holds_every_owner_once_within_the_limit(lengths: list[list[float]]) -> None:
    durations_N = np.asarray([d for group in lengths for d in group])
    starts = np.cumsum([0, *map(len, lengths)])
    groups = {k + 1: list(range(starts[k], starts[k + 1])) for k in range(len(lengths))}
    batches = packed(groups, durations_N, Seconds(20.0))
    assert sorted(row for b in batches for row in b) == sorted(groups)
    for rows in batches:
        indices = [i for row in rows for i in groups[row]]
        assert len(rows) == 1 or len(indices) * durations_N[indices].max() <= 20.0


def test_the_rate_rises_then_falls() -> None:
    rates = [replace(SCHEDULE, rounds=40).rate(r) for r in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.1 <= rates[-1] < 0.11 and max(rates) == 1.0


@pytest.mark.parametrize("method", ["adapter", "generated"])
def test_a_stopped_run_goes_on_bit_for_bit(
    method: str, base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = training(base, monkeypatch, OWNERS, method=method)
    expected = whole.run()
    for stop in (3, 5):

        class Stopped(Exception):
            pass

        def tell(done: int, rounds: int, active: int, stop: int = stop) -> None:
            if done == stop:
                raise Stopped

        halfway = Halfway(tmp_path / f"{stop}.safetensors", "this job", pause=Seconds(0.0))
        with pytest.raises(Stopped):
            training(base, monkeypatch, OWNERS, method=method).run(tell, halfway)
        assert (
            training(base, monkeypatch, OWNERS, method=method).run(halfway=Halfway(halfway.path, "another")) is not None
        )
        again = training(base, monkeypatch, OWNERS, method=method)
        rounds: list[int] = []
        assert again.run(lambda done, n, active, rounds=rounds: rounds.append(done), halfway) == expected
        assert rounds[0] == stop + 1
        for where, p in (whole.bank.tensors | whole.bank.shared).items():
            assert torch.equal((again.bank.tensors | again.bank.shared)[where], p), where
        halfway.remove()
        assert not list(tmp_path.glob(f"{stop}*"))


def test_what_is_kept_is_written_now_and_then_and_damage_is_as_good_as_nothing(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    halfway = Halfway(tmp_path / "halfway.safetensors", "this job")
    training(base, monkeypatch, ["ann"]).run(halfway=halfway)
    assert not halfway.path.exists(), "the run took less than the pause"
    halfway.path.write_bytes(b"cut off")
    assert halfway.read() is None
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match="cannot be written"):
        Halfway(tmp_path / "file" / "halfway", "this job").write({}, {})
