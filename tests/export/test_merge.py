"""A merged model is the base with its live voice, and what cannot be merged says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCTC

from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.extract import extract
from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.subnet import uniform
from manyvoice.errors import VoiceError
from manyvoice.export.merge import merge
from manyvoice.models.anatomy import anatomy_of
from manyvoice.models.load import build_model
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.method import methods
from manyvoice.submodels.voice import Voice

MakeVoice = Callable[..., Voice]

LENGTHS = [70, 44]
EVERYWHERE = ("ff1.up", "ff1.down", "ff2.up", "ff2.down", "attention.query", "attention.key", "attention.value",
              "attention.out")  # fmt: skip


def double(recogniser: Recogniser) -> Recogniser:
    model = copy.deepcopy(recogniser.model).double()
    return Recogniser(model, recogniser.family, recogniser.tokenizer, recogniser.log_mel)


def live(recogniser: Recogniser, voice: Voice, x_BTF: Tensor) -> Tensor:
    bank = Bank(anatomy_of(recogniser.model), voice.method, ["one"], empty=True, dtype=torch.float64)
    bank.put(1, voice.tensors)
    with bank.on(recogniser.model, torch.ones(len(x_BTF), dtype=torch.int64)):
        return recogniser.logp(x_BTF, torch.tensor(LENGTHS)).x


def noise() -> Tensor:
    return torch.randn(2, 70, 80, dtype=torch.float64)


@pytest.mark.parametrize(("name", "roles"), [("lora", EVERYWHERE), ("lora", None), ("scale", EVERYWHERE)])
def test_merged_is_live(base: Recogniser, make_voice: MakeVoice, name: str, roles: tuple[str, ...] | None) -> None:
    base = double(base)
    before = copy.deepcopy(base.model.state_dict())
    voice = make_voice(base, name, **({} if roles is None else {"roles": roles}))
    merged, x_BTF = merge(base, voice), noise()
    found, expected = merged.logp(x_BTF, torch.tensor(LENGTHS)).x, live(base, voice, x_BTF)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected[0], base.logp(x_BTF, torch.tensor(LENGTHS)).x[0], atol=1e-2)
    assert all(torch.equal(t, before[n]) for n, t in base.model.state_dict().items()), "the base was changed"


def test_a_merged_model_is_cut_to_a_size_as_its_voice_is(base: Recogniser, make_voice: MakeVoice) -> None:
    base = double(base)
    voice, x_BTF = make_voice(base, "lora", roles=EVERYWHERE), noise()
    elastic = Elastic(base.model)
    subnet = uniform(elastic.anatomy, "x", [0, 2], {"head": 2, "ff_chunk": 3})
    small = Recogniser(extract(elastic, subnet), base.family, base.tokenizer, base.log_mel)
    bank = Bank(elastic.anatomy, voice.method, ["one"], empty=True, dtype=torch.float64)
    bank.put(1, voice.tensors)
    plan = elastic.plan(subnet)
    with bank.on(small.model, torch.ones(2, dtype=torch.int64), layers=plan.layers, slices=plan.slices):
        expected = small.logp(x_BTF, torch.tensor(LENGTHS)).x
    model = extract(Elastic(merge(base, voice).model), subnet)
    merged = Recogniser(model, base.family, base.tokenizer, base.log_mel)
    found = merged.logp(x_BTF, torch.tensor(LENGTHS)).x
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-9)


def test_stock_transformers_runs_what_was_saved(base: Recogniser, make_voice: MakeVoice, tmp_path: Path) -> None:
    merged = merge(base, make_voice(base, "lora"))
    merged.save(tmp_path / "out")
    stock = AutoModelForCTC.from_pretrained(tmp_path / "out").eval()
    x_BTF = noise()[:1].float()
    with torch.no_grad():
        logits = stock(x_BTF, attention_mask=torch.ones(1, 70, dtype=torch.bool)).logits
    found = merged.logp(x_BTF, torch.tensor([70])).x
    torch.testing.assert_close(logits.log_softmax(-1), found, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_says_why(base: Recogniser, make_voice: MakeVoice) -> None:
    with pytest.raises(VoiceError, match=r"method adapter cannot be worked into the weights.*keep it apart: --to onnx"):
        merge(base, make_voice(base, "adapter"))
    voice = make_voice(base, "lora")
    foreign = Voice(method=voice.method, tensors=voice.tensors, base="b" * 64, tokenizer=voice.tokenizer)
    with pytest.raises(VoiceError, match="was made for the base bbbbbbbbbbbb"):
        merge(base, foreign)


def test_a_shift_needs_a_bias(base: Recogniser, make_voice: MakeVoice) -> None:
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                "subsampling_conv_channels": 8, "attention_bias": False}  # fmt: skip
    model, family = build_model("tiny", settings, vocabulary=len(base.tokenizer), blank=base.tokenizer.blank)
    bare = Recogniser(model.eval(), family, base.tokenizer, base.log_mel)
    assert model.get_submodule("encoder.layers.0.self_attn.k_proj").bias is None
    voice = make_voice(bare, "scale", roles=("attention.key",))
    with pytest.raises(VoiceError, match=r"shifts 0\.attention\.key, but that map .* has no bias"):
        merge(bare, voice)
    still = {where: t * (where[1] == "gain") for where, t in voice.tensors.items()}
    gains = Voice(method=voice.method, tensors=still, base=voice.base, tokenizer=voice.tokenizer)
    x_BTF = noise()
    wide, twin = double(merge(bare, gains)), double(bare)
    exact = Voice(method=gains.method, tensors={w: t.double() for w, t in still.items()}, base="", tokenizer="")
    torch.testing.assert_close(
        wide.logp(x_BTF, torch.tensor(LENGTHS)).x[0], live(twin, exact, x_BTF)[0], rtol=1e-4, atol=1e-5
    )


def test_every_method_says_whether_it_merges(base: Recogniser) -> None:
    """Where it does, the new map is the edit; a method without the hook is refused by :func:`merge`."""
    anatomy, seen = anatomy_of(base.model), set()
    for name, kind in methods().items():
        method = kind()
        site = method.sites(anatomy)[0]
        if site.kind == "stream":
            continue
        one = {n: torch.randn(p.shape, dtype=torch.float64) for n, p in method.parts(site).items()}
        weight = torch.randn(site.width_out, site.width_in, dtype=torch.float64)
        bias, x = torch.randn(site.width_out, dtype=torch.float64), torch.randn(1, 5, site.width_in).double()
        made = method.merged(one, weight, bias)
        if made is None:
            continue
        seen.add(name)
        y = method.edit({n: t[None] for n, t in one.items()}, x, torch.nn.functional.linear(x, weight, bias))
        torch.testing.assert_close(torch.nn.functional.linear(x, *made), y, rtol=1e-9, atol=1e-9)
    assert seen >= {"lora", "scale"}
