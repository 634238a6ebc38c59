"""One contract for every method, present and future."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyvoice.elastic.extract import extract
from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.subnet import uniform
from manyvoice.errors import ModelError, UsageError
from manyvoice.models.anatomy import anatomy_of, family_of
from manyvoice.models.load import build_model
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.method import make_method, methods
from manyvoice.submodels.optim import RowAdamW, per_owner
from manyvoice.submodels.voice import Voice
from manyvoice.train.objective import ctc_per_utterance, scores_of
from manyvoice.types import Batch, Padded

NAMES = sorted(methods())


@pytest.fixture(params=NAMES)
def bank(request: pytest.FixtureRequest, base: PreTrainedModel) -> Bank:
    return Bank(anatomy_of(base), make_method(request.param), ["ann", "bob", "cem"], dtype=torch.float64)


def scrambled(bank: Bank) -> Bank:
    """Rows that say something; the identity stays what it is."""
    gen = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in bank.parameters():
            p[1:] += 0.3 * torch.randn(p[1:].shape, generator=gen, dtype=p.dtype)
        for p in bank.shared.values():
            p += 0.3 * torch.randn(p.shape, generator=gen, dtype=p.dtype)
    return bank


@torch.no_grad()
def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Without a graph: attention has another kernel, and other last bits, where gradients are wanted."""
    return scores_of(model, batch).x


def test_all_methods_are_under_test() -> None:
    assert set(NAMES) >= {"adapter", "generated", "lora", "mixture", "scale"}


def test_fresh_is_the_base(bank: Bank, base: PreTrainedModel, batch: Batch) -> None:
    before = logits(base, batch)
    for owners in ([0, 0, 0], [1, 2, 3], [0, 3, 1]):
        with bank.on(base, torch.tensor(owners)) as ran:
            assert torch.equal(logits(base, batch), before)
        assert ran.sites == set(bank.sites)
    assert torch.equal(logits(base, batch), before)


def test_mixed_is_alone(bank: Bank, base: PreTrainedModel, batch: Batch) -> None:
    scrambled(bank)
    bare = logits(base, batch)
    with bank.on(base, torch.tensor([2, 0, 1])):
        mixed = logits(base, batch)
    assert torch.equal(mixed[1], bare[1])
    for b, owner in enumerate((2, 0, 1)):
        one = batch.rows(b, b + 1)
        with bank.on(base, torch.tensor([owner])):
            alone = logits(base, one)[0]
        torch.testing.assert_close(mixed[b, : len(alone)], alone, rtol=0, atol=1e-12)
    assert not torch.allclose(mixed[0], bare[0]) and not torch.allclose(mixed[2], bare[2])


def test_fifty_steps_lower_the_loss_and_leave_the_identity(bank: Bank, base: PreTrainedModel, batch: Batch) -> None:
    owner_B = torch.tensor([1, 1, 3])
    identity = [p[0].detach().clone() for p in bank.parameters()]
    untouched = [p[2].detach().clone() for p in bank.parameters()]
    optimizer = RowAdamW(bank.parameters(), 2e-2)
    shared = list(bank.shared.values())
    others = [torch.optim.AdamW(shared, 2e-2)] if shared else []
    losses = []
    for _ in range(50):
        with bank.on(base, owner_B):
            loss = per_owner(loss_of(base, batch), owner_B)
        loss.backward()
        optimizer.step(owner_B)
        optimizer.zero_grad()
        for other in others:
            other.step()
            other.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    for p, zero, two in zip(bank.parameters(), identity, untouched, strict=True):
        assert torch.equal(p[0], zero) and torch.equal(p[2], two)
    assert all(p.grad is None for p in base.parameters() if not p.requires_grad)


def loss_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    scores: Padded = scores_of(model, batch)
    return ctc_per_utterance(scores, batch.tokens_BU, batch.token_len_B, family_of(model).blank(model))


def test_trained_together_is_trained_alone(bank: Bank, base: PreTrainedModel, batch: Batch) -> None:
    """Unequal numbers of utterances, and owners that are absent from some steps."""
    if bank.shared:
        pytest.skip("owners of a method that shares tensors learn from one another")
    plan = [[1, 2, 2], [3, 1, 1], [2, 2, 2], [1, 2, 3], [3, 3, 1]]
    together = RowAdamW(bank.parameters(), 1e-2, weight_decay=0.1, clip=0.5)
    for owners in plan:
        owner_B = torch.tensor(owners)
        with bank.on(base, owner_B):
            per_owner(loss_of(base, batch), owner_B).backward()
        together.step(owner_B)
        together.zero_grad()
    for row, owner in enumerate(bank.owners, start=1):
        single = Bank(anatomy_of(base), bank.method, [owner], dtype=torch.float64)
        optimizer = RowAdamW(single.parameters(), 1e-2, weight_decay=0.1, clip=0.5)
        for owners in plan:
            mine = [b for b, o in enumerate(owners) if o == row]
            if not mine:
                continue
            losses = []
            for b in mine:
                with single.on(base, torch.tensor([1])):
                    losses.append(loss_of(base, batch.rows(b, b + 1)))
            torch.cat(losses).mean().backward()
            optimizer.step(torch.tensor([1]))
            optimizer.zero_grad()
        for where, p in single.tensors.items():
            torch.testing.assert_close(p[1], bank.tensors[where][row], rtol=1e-9, atol=1e-10, msg=str((owner, where)))


def test_the_row_optimiser_is_adamw() -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 4, 2, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    rows = RowAdamW([ours], 1e-2, betas=(0.9, 0.98), weight_decay=0.1, clip=None)
    stock = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1)
    for k in range(6):
        for p in (ours, theirs):
            ((p - k) ** 2).sum().backward()
        rows.step(torch.tensor([0, 1, 2]))
        stock.step()
        rows.zero_grad()
        stock.zero_grad()
    torch.testing.assert_close(ours[1:], theirs[1:])
    assert torch.equal(ours[0], start[0])


def test_a_bank_on_a_narrowed_model_is_a_bank_on_the_extracted_one(
    bank: Bank, base: PreTrainedModel, batch: Batch
) -> None:
    scrambled(bank)
    elastic = Elastic(base)
    subnet = uniform(elastic.anatomy, "x", [0, 2], {"head": 2, "ff_chunk": 3})
    plan = elastic.plan(subnet)
    owner_B = torch.tensor([3, 0, 1])
    with bank.on(base, owner_B, slices=plan.slices) as ran, elastic.at(subnet):
        narrowed = logits(base, batch)
    assert {key.split(".")[0] for key in ran.sites} == {"0", "2"}
    small = extract(elastic, subnet)
    with bank.on(small, owner_B, layers=plan.layers, slices=plan.slices) as ran_too:
        extracted = logits(small, batch)
    assert torch.equal(narrowed, extracted) and ran_too.sites == ran.sites
    assert not torch.allclose(extracted[0], logits(small, batch)[0])


def test_stored_is_live(bank: Bank, base: PreTrainedModel, batch: Batch, tmp_path: Path) -> None:
    """What is taken from a bank, written and read is a submodel of a method that stands by itself."""
    scrambled(bank)
    with bank.on(base, torch.tensor([2, 3, 0])):
        live = logits(base, batch)
    alone = bank.method.alone()
    fresh = Bank(anatomy_of(base), alone, ["x", "y"], empty=True, dtype=torch.float64)
    assert not fresh.shared
    for row, owner in ((1, 2), (2, 3)):
        voice = Voice(method=alone, tensors=bank.take(owner), base="b", tokenizer="t")
        read = Voice.read(voice.write(tmp_path / f"{owner}.safetensors"))
        fresh.put(row, read.check(anatomy_of(base), base="b", tokenizer="t").tensors)
    with fresh.on(base, torch.tensor([1, 2, 0])):
        stored = logits(base, batch)
    torch.testing.assert_close(stored, live, rtol=0, atol=1e-11)
    if alone == bank.method:
        assert torch.equal(stored, live)


def test_leaves_are_the_rows(bank: Bank, base: PreTrainedModel, batch: Batch) -> None:
    """Gradients of a few rows are those of the whole bank there."""
    scrambled(bank)
    owner_B = torch.tensor([3, 1, 3])
    with bank.on(base, owner_B):
        loss_of(base, batch).sum().backward()
    few = bank.leaves(torch.tensor([1, 3]))
    assert few.owners == ("ann", "cem")
    with few.on(base, torch.tensor([2, 1, 2])):
        loss_of(base, batch).sum().backward()
    for where, p in few.tensors.items():
        whole, part = bank.tensors[where].grad, p.grad
        assert whole is not None and part is not None
        torch.testing.assert_close(part[1:], whole[[1, 3]])


def test_two_banks_at_once(base: PreTrainedModel, batch: Batch) -> None:
    one = scrambled(Bank(anatomy_of(base), make_method("lora"), ["x"], dtype=torch.float64))
    two = scrambled(Bank(anatomy_of(base), make_method("adapter"), ["x", "y"], dtype=torch.float64))
    with one.on(base, torch.tensor([1, 0, 1])), two.on(base, torch.tensor([2, 1, 0])):
        both = logits(base, batch)
    with two.on(base, torch.tensor([2, 1, 0])):
        assert torch.equal(both[1], logits(base, batch)[1])
    with one.on(base, torch.tensor([1, 0, 1])):
        assert torch.equal(both[2], logits(base, batch)[2])


def test_wrong_words_are_refused(base: PreTrainedModel, batch: Batch) -> None:
    with pytest.raises(UsageError, match=r"method 'prompt': there are adapter"):
        make_method("prompt")
    with pytest.raises(UsageError, match="method adapter: no setting width; it has rank, scale"):
        make_method("adapter", {"width": 3})
    with pytest.raises(UsageError, match=r"adapter\.rank = 0, adapter\.scale = 8\.0: both must be above 0"):
        make_method("adapter", {"rank": 0})
    with pytest.raises(UsageError, match=r"lora\.roles: this model has no decoder; it has attention\.key"):
        Bank(anatomy_of(base), make_method("lora", {"roles": ("decoder",)}), ["a"])
    with pytest.raises(UsageError, match="no two the same"):
        Bank(anatomy_of(base), make_method("lora"), ["a", "a"])
    bank = Bank(anatomy_of(base), make_method("adapter"), ["a"], dtype=torch.float64)
    with pytest.raises(UsageError, match="owner rows are 0 to 1 in this bank"), bank.on(base, torch.tensor([0, 2, 1])):
        pass
    with pytest.raises(UsageError, match="no submodel 'b' in this bank of 1, such as a"):
        bank.row("b")
    shallow, _ = build_model("tiny", {"num_hidden_layers": 1}, vocabulary=9, blank=8)
    with pytest.raises(ModelError, match="made for another base"), bank.on(shallow, torch.tensor([1]), layers=[7]):
        pass
