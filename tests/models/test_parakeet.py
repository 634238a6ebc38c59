"""Parakeet: equal to stock Transformers, and costs that a counter confirms."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ParakeetForCTC, PreTrainedModel

from manyvoice.elastic.extract import extract
from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.subnet import Subnet, whole
from manyvoice.errors import ModelError
from manyvoice.models.anatomy import anatomy_of
from manyvoice.models.load import build_model
from manyvoice.models.parakeet import FAMILY, PRESETS
from manyvoice.models.parakeet_slim import ParakeetSlimForCTC
from manyvoice.types import mask_of

SMALL = dict(PRESETS["tiny"]) | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "subsampling_conv_channels": 8,
}


@pytest.fixture
def model() -> PreTrainedModel:
    return FAMILY.build(SMALL, vocabulary=9, blank=8).double().eval()


def test_equal_to_stock_with_the_same_weights(model: PreTrainedModel) -> None:
    stock = ParakeetForCTC(model.config).double().eval()
    stock.load_state_dict(model.state_dict())
    x, len_B = torch.randn(3, 50, 80, dtype=torch.float64), torch.tensor([50, 31, 12])
    ours = FAMILY.logits(model, FAMILY.encode(model, x, len_B))
    theirs = stock(x, attention_mask=mask_of(len_B, 50)).logits
    torch.testing.assert_close(ours.x, theirs, atol=1e-14, rtol=1e-14)


def test_gradients_equal_stock_in_evaluation_mode(model: PreTrainedModel) -> None:
    stock = ParakeetForCTC(model.config).double().eval()
    stock.load_state_dict(model.state_dict())
    x, len_B = torch.randn(2, 40, 80, dtype=torch.float64), torch.tensor([40, 40])
    FAMILY.logits(model, FAMILY.encode(model, x, len_B)).x.square().sum().backward()
    stock(x, attention_mask=mask_of(len_B, 40)).logits.square().sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize("frames", [120, 400])
def test_costs_agree_with_a_counter(model: PreTrainedModel, frames: int) -> None:
    x, len_B = torch.randn(1, frames, 80, dtype=torch.float64), torch.tensor([frames])
    # the fused attention of the CPU is unknown to the counter; its plain form is two products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoded = FAMILY.encode(model, x, len_B)
        FAMILY.logits(model, encoded)
    anatomy = anatomy_of(model)
    T = int(encoded.len_B[0])
    macs = sum(c.cost.macs(T) for c in anatomy.components) + anatomy.front.macs(T) + anatomy.head.macs(T)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.01)


def test_zeroing_what_a_cut_names_is_the_model_without_it(model: PreTrainedModel) -> None:
    """A head: zero columns of its output, or zero rows of its values and their bias, are the same."""
    head = next(c for c in anatomy_of(model).components if c.kind == "head")
    x, len_B = torch.randn(1, 30, 80, dtype=torch.float64), torch.tensor([30])
    outputs = []
    for wanted in ("o_proj.weight", "v_proj"):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            for cut in head.cuts:
                if wanted in cut.parameter:
                    model.get_parameter(cut.parameter).narrow(cut.dim, cut.start, cut.stop - cut.start).zero_()
        outputs.append(FAMILY.encode(model, x, len_B).x)
        model.load_state_dict(before, strict=False)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-14, rtol=1e-14)
    assert not torch.equal(outputs[0], FAMILY.encode(model, x, len_B).x)


def test_presets_have_the_sizes_the_documentation_says() -> None:
    sizes = {}
    for name, settings in PRESETS.items():
        with torch.device("meta"):
            built = ParakeetForCTC(FAMILY.config(settings, vocabulary=256, blank=255))
        sizes[name] = round(sum(p.numel() for p in built.parameters()) / 1e6)
    assert sizes == {"tiny": 3, "small": 26, "medium": 109}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"hiden_size": 3}, r"model\.hiden_size: Parakeet's encoder has no such setting"),
        ({"hidden_size": 30, "num_attention_heads": 4}, r"must divide by model\.num_attention_heads = 4"),
        ({"hidden_size": "wide"}, "model settings"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        FAMILY.build({**SMALL, **settings}, vocabulary=9, blank=8)


def test_another_vocabulary_keeps_the_encoder(model: PreTrainedModel) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.3)  # learned statistics come along
    new = FAMILY.renewed(model, vocabulary=31, blank=30).double().eval()
    assert (new.config.vocab_size, FAMILY.blank(new)) == (31, 30)
    x, len_B = torch.randn(2, 40, 80, dtype=torch.float64), torch.tensor([40, 27])
    one, other = (FAMILY.encode(m, x, len_B) for m in (model, new))
    assert torch.equal(one.x, other.x)
    assert FAMILY.logits(new, other).x.shape[-1] == 31


def test_another_vocabulary_for_a_model_of_uneven_layers(model: PreTrainedModel) -> None:
    elastic = Elastic(model)
    gone = {c.name for c in elastic.anatomy.components if c.layer == 0 and c.kind == "ff_chunk" and c.index}
    slim = extract(elastic, Subnet(name="uneven", kept=whole(elastic.anatomy).kept - gone))
    assert isinstance(slim, ParakeetSlimForCTC)
    new = FAMILY.renewed(slim, vocabulary=31, blank=30).double().eval()
    x, len_B = torch.randn(1, 40, 80, dtype=torch.float64), torch.tensor([40])
    assert torch.equal(FAMILY.encode(slim, x, len_B).x, FAMILY.encode(new, x, len_B).x)
    assert (new.config.vocab_size, new.config.layer_sizes) == (31, slim.config.layer_sizes)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_new_model_hears(preset: str) -> None:
    """What differs from frame to frame is well above the eps of the first norm, sqrt(1e-5), with any subsampling."""
    for factor in (4, 8):
        settings = {"subsampling_factor": factor, "num_hidden_layers": 1}
        model, _ = build_model(preset, settings, vocabulary=9, blank=8)
        x_BTF = torch.randn(2, 240, 80)
        with torch.no_grad():
            x_BTD = model.get_submodule("encoder.subsampling")(x_BTF, torch.ones(2, 240, dtype=torch.bool))
        assert float(x_BTD.std(1).mean()) > 2 * 1e-5**0.5
