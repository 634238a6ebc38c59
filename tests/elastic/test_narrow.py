"""Narrowed, extracted and an oracle that knows nothing of slicing compute the same; afterwards all is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCTC, PreTrainedModel

from manyvoice.elastic.extract import extract, tensors_of
from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.subnet import Subnet, uniform, whole
from manyvoice.errors import ModelError
from manyvoice.models import batchnorm
from manyvoice.models.anatomy import Anatomy, anatomy_of, family_of, parameter_count
from manyvoice.models.cost import cost_of
from manyvoice.models.load import build_model, fingerprint, load_model
from manyvoice.train.objective import ctc
from manyvoice.types import Batch

Build = Callable[..., PreTrainedModel]
# four heads and four chunks in each of three layers
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}


def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    family = family_of(model)
    return family.logits(model, family.encode(model, batch.features_BTF, batch.len_B)).x


@torch.no_grad()
def oracle(model: PreTrainedModel, subnet: Subnet) -> PreTrainedModel:
    """A copy whose dropped units write nothing, and whose dropped layers are deleted."""
    copied = copy.deepcopy(model)
    layers = copied.encoder.layers
    K = layers[0].self_attn.head_dim
    kept_layers = []
    for i, layer in enumerate(layers):
        if f"layers.{i}" not in subnet.kept:
            continue
        kept_layers.append(layer)
        for short, ff in (("ff1", layer.feed_forward1), ("ff2", layer.feed_forward2)):
            chunk = ff.linear1.out_features // 4
            gone = [k for k in range(4) if f"layers.{i}.{short}.{k}" not in subnet.kept]
            for k in gone:
                ff.linear2.weight[:, k * chunk : (k + 1) * chunk] = 0
            if len(gone) == 4:
                ff.linear2.bias.zero_()
        gone = [h for h in range(4) if f"layers.{i}.head.{h}" not in subnet.kept]
        for h in gone:
            layer.self_attn.o_proj.weight[:, h * K : (h + 1) * K] = 0
        if len(gone) == 4:
            layer.self_attn.o_proj.bias.zero_()
        if f"layers.{i}.conv" not in subnet.kept:
            layer.conv.pointwise_conv2.weight.zero_()
            layer.conv.pointwise_conv2.bias.zero_()
    copied.encoder.layers = torch.nn.ModuleList(kept_layers)
    return copied


def any_subnet(anatomy: Anatomy) -> st.SearchStrategy[Subnet]:
    """Any set of components of any non-empty set of layers."""

    def made(chosen: list[bool]) -> Subnet:
        kept = {c.name for c, keep in zip(anatomy.components, chosen, strict=True) if keep}
        kept |= {"layers.0"} if not any(f"layers.{i}" in kept for i in range(anatomy.depth)) else set()
        return Subnet(name="any", kept=frozenset(n for n in kept if ".".join(n.split(".")[:2]) in kept))

    n = len(anatomy.components)
    return st.lists(st.booleans(), min_size=n, max_size=n).map(made)


ANATOMY = anatomy_of(build_model("tiny", SMALL, vocabulary=9, blank=8)[0])


def test_statistics_go_to_where_the_model_is(model: PreTrainedModel) -> None:
    """A size's are read on the CPU, whatever the model is on."""
    elsewhere = copy.deepcopy(model)
    elastic = Elastic(elsewhere)
    measured, subnet = elastic.statistics(), whole(elastic.anatomy)
    norm = next(iter(batchnorm.masked_norms(elsewhere)))
    with elastic.at(subnet, statistics=measured):
        assert any(norm.running_mean is x for x in measured.values()), "what is there stays itself"
    elsewhere.to("meta")
    with elastic.at(subnet, statistics=measured):
        assert {b.device.type for b in norm.buffers()} == {"meta"}


@settings(max_examples=25, deadline=None)
@given(subnet=any_subnet(ANATOMY))
def test_narrowed_is_extracted_is_the_oracle(subnet: Subnet, model: PreTrainedModel, batch: Batch) -> None:
    elastic = Elastic(model)
    before = logits(model, batch)
    with elastic.at(subnet):
        narrowed = logits(model, batch)
    alone = extract(elastic, subnet)
    assert torch.equal(logits(alone, batch), narrowed)
    torch.testing.assert_close(narrowed, logits(oracle(model, subnet), batch), rtol=0, atol=1e-11)
    assert torch.equal(logits(model, batch), before)
    assert parameter_count(alone) == cost_of(model, family_of(model), subnet.kept).parameters


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@settings(max_examples=10, deadline=None)
@given(subnet=any_subnet(ANATOMY))
def test_gradients_reach_the_kept_units_and_no_others(
    activation_checkpointing: bool, subnet: Subnet, batch: Batch, small: Build
) -> None:
    model = small()
    reference = oracle(model, subnet)
    batchnorm.freeze(model)
    batchnorm.freeze(reference)
    model.train(), reference.train()
    if activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    elastic = Elastic(model)
    with elastic.at(subnet):
        ctc(model, batch).total.backward()
    ctc(reference, batch).total.backward()
    plan = elastic.plan(subnet)
    place = {f"encoder.layers.{i}.": f"encoder.layers.{n}." for n, i in enumerate(plan.layers)}
    wanted = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        head = next((h for h in place if name.startswith(h)), None)
        inside = not name.startswith("encoder.layers.") or head is not None
        if not inside or any(name.startswith(f"{path}.") for path in plan.dropped):
            assert p.grad is None, name
            continue
        other = wanted[name if head is None else place[head] + name[len(head) :]].grad
        if p.grad is None:  # frozen, or not used by this model at all
            assert other is None or not other.any(), name
            continue
        for one in plan.slices.get(name, ()):
            other, kept = one.of(other), one.of(p.grad)
            torch.testing.assert_close(kept, other, rtol=1e-9, atol=1e-9)
            assert float(p.grad.abs().sum()) == pytest.approx(float(kept.abs().sum()))
        if name not in plan.slices:
            torch.testing.assert_close(p.grad, other, rtol=1e-9, atol=1e-9)


def test_everything_is_restored_even_after_an_error(batch: Batch, small: Build) -> None:
    model = small()
    elastic = Elastic(model)
    names = [n for n, _ in model.named_parameters()]
    dicts = [(m, dict(m.__dict__), dict(m._modules)) for m in model.modules()]
    before = fingerprint(model)
    subnet = uniform(elastic.anatomy, "x", [0, 2], {"head": 2, "ff_chunk": 1})
    with pytest.raises(ZeroDivisionError), elastic.at(subnet, dropout=True, statistics=elastic.statistics()):
        assert len([*model.parameters()]) < len(names)
        raise ZeroDivisionError
    assert fingerprint(model) == before and [n for n, _ in model.named_parameters()] == names
    for module, attributes, children in dicts:
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[k] is v for k, v in attributes.items())
        assert [*module._modules] == [*children] and all(module._modules[k] is v for k, v in children.items())


def test_compute_shrinks(model: PreTrainedModel, batch: Batch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return int(counter.get_total_flops())

    elastic = Elastic(model)
    subnet = uniform(elastic.anatomy, "x", [0, 2], {"head": 2, "ff_chunk": 1})
    all_of_it = flops(lambda: logits(model, batch))
    with elastic.at(subnet):
        narrowed = flops(lambda: logits(model, batch))
    assert narrowed == flops(lambda: logits(extract(elastic, subnet), batch)) < all_of_it


def test_a_uniform_subnet_is_a_stock_folder(model: PreTrainedModel, batch: Batch, tmp_path: Path) -> None:
    elastic = Elastic(model)
    alone = extract(elastic, uniform(elastic.anatomy, "x", [0, 2], {"head": 3, "ff_chunk": 2}))
    alone.save_pretrained(tmp_path)
    assert alone.config.model_type == "parakeet_ctc"
    stock = AutoModelForCTC.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(stock).__name__ == "ParakeetForCTC"
    mask_BT = torch.arange(50) < batch.len_B[:, None]
    # padded frames differ: stock BatchNorm is ours in evaluation mode
    torch.testing.assert_close(stock.eval()(batch.features_BTF, attention_mask=mask_BT).logits, logits(alone, batch))


def test_an_uneven_subnet_is_a_folder_of_ours(model: PreTrainedModel, batch: Batch, tmp_path: Path) -> None:
    elastic = Elastic(model)
    gone = {"layers.0.conv", "layers.1.head.0", "layers.1.head.2", "layers.2.ff1.1",
            *(f"layers.0.ff2.{k}" for k in range(4)), *(f"layers.2.head.{h}" for h in range(4))}  # fmt: skip
    subnet = Subnet(name="uneven", kept=whole(elastic.anatomy).kept - gone)
    alone = extract(elastic, subnet)
    alone.save_pretrained(tmp_path)
    assert alone.config.model_type == "manyvoice_parakeet_ctc"
    again, family = load_model(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(again, batch), logits(alone, batch))
    assert family.anatomy(again).depth == 3 and fingerprint(again) == fingerprint(alone)


def test_a_size_has_statistics_of_its_own(batch: Batch, small: Build) -> None:
    model = small()
    elastic = Elastic(model)
    subnet = uniform(elastic.anatomy, "x", [0, 1], {"head": 2, "ff_chunk": 2})
    own = elastic.statistics()
    before = fingerprint(model)

    def forwards() -> Iterator[Callable[[], object]]:
        yield lambda: logits(model, batch)

    with elastic.at(subnet, statistics=own):
        batchnorm.recalibrate(model, forwards())
        calibrated = logits(model, batch)
    assert fingerprint(model) == before
    with elastic.at(subnet):
        assert not torch.allclose(logits(model, batch), calibrated)
    assert torch.equal(logits(extract(elastic, subnet, statistics=own), batch), calibrated)
    assert "encoder.layers.0.conv.norm.running_mean" in tensors_of(elastic, subnet, statistics=own)


def test_dropout_follows_the_kept_width(small: Build) -> None:
    model = small(activation_dropout=0.4, attention_dropout=0.2)
    elastic = Elastic(model)
    subnet = uniform(elastic.anatomy, "x", [0], {"head": 1, "ff_chunk": 2})
    layer = model.encoder.layers[0]
    with elastic.at(subnet, dropout=True):
        assert layer.feed_forward1.activation_dropout == pytest.approx(0.2)
        assert layer.self_attn.attention_dropout == pytest.approx(0.05)
    with elastic.at(subnet):
        assert layer.feed_forward1.activation_dropout == 0.4
    assert layer.self_attn.attention_dropout == 0.2


def test_what_cannot_be_narrowed_is_refused(model: PreTrainedModel, small: Build) -> None:
    elastic = Elastic(model)
    everything = whole(elastic.anatomy)
    for other in (elastic, Elastic(elastic.model)):
        with pytest.raises(ModelError, match="narrowed already"), elastic.at(everything), other.at(everything):
            pass
    with pytest.raises(ModelError, match="narrowed already"), elastic.at(everything), elastic.at(everything):
        pass
    for kept, message in (
        ({"layers.0", "layers.9.conv"}, r"keeps layers\.9\.conv, which this model does not have; it has 3 layers"),
        ({"layers.0.conv"}, "keeps no layer"),
        ({"layers.0", "layers.1.conv"}, r"keeps layers\.1\.conv of layers that it drops"),
    ):
        with pytest.raises(ModelError, match=message), elastic.at(Subnet(name="x", kept=frozenset(kept))):
            pass
    reentrant = small()
    reentrant.activation_checkpointing_enable({"use_reentrant": True})
    wrong = pytest.raises(ModelError, match="reentrant activation checkpointing computes wrong gradients")
    with wrong, Elastic(reentrant).at(everything):
        pass
    with pytest.raises(ModelError, match="no anatomy for Linear"):
        Elastic(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
