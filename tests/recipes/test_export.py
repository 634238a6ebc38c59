"""Exports of a supernet's sizes with voices: what a folder says reaches the exporters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from manyvoice.data.features import LogMel
from manyvoice.data.tokens import train_tokenizer
from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.subnet import uniform
from manyvoice.errors import UsageError, VoiceError
from manyvoice.export.flat import VoiceInput
from manyvoice.export.onnx import Exported
from manyvoice.models.load import build_model
from manyvoice.recipes import export as recipe
from manyvoice.recipes.sizes import SUBNET, Size, write_size
from manyvoice.recipes.variant import load_variant
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.method import make_method
from manyvoice.submodels.voice import Voice

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32,
         "subsampling_conv_channels": 8}  # fmt: skip


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one size, untrained."""
    folder = tmp_path_factory.mktemp("supernet") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = train_tokenizer(["turn on the light"], "characters")
        model, family = build_model("tiny", SMALL, vocabulary=len(tokenizer), blank=tokenizer.blank)
    Recogniser(model.eval(), family, tokenizer, LogMel.build(family.features(model))).save(folder)
    base = Recogniser.load(folder)
    subnet = uniform(base.family.anatomy(base.model), "40", [0, 2], {"head": 2, "ff_chunk": 3})
    costs = {"costs": {"layer_macs": 1.0}, "results": {}}
    write_size(base, Size(subnet=subnet, statistics=None, document={}), costs)
    return folder


@pytest.fixture(scope="module")
def voice(supernet: Path) -> Voice:
    base = Recogniser.load(supernet)
    method = make_method("lora", {"roles": ("ff1.up", "attention.out")})
    bank = Bank(base.family.anatomy(base.model), method, ["one"])
    with torch.no_grad():
        for p in bank.parameters():
            p[1] += 0.1 * torch.randn(p[1].shape, generator=torch.Generator().manual_seed(0))
    return Voice(
        method=method, tensors=bank.take(1), base=base.fingerprint(), tokenizer=base.tokenizer.fingerprint()
    )  # fmt: skip


def test_a_voice_merged_into_a_size_is_the_live_voice_on_it(supernet: Path, voice: Voice, tmp_path: Path) -> None:
    assert recipe.export_merged(supernet, tmp_path / "out", voice, size="40") == {}
    variant = load_variant(supernet, "40")
    bank = Bank(variant.anatomy, voice.method, ["one"], empty=True)
    bank.put(1, voice.tensors)
    x_BTF, len_B = torch.randn(1, 60, 80), torch.tensor([60])
    live, bare = variant.logp(bank, torch.tensor([1]), x_BTF, len_B).x, variant.recogniser.logp(x_BTF, len_B).x
    merged = Recogniser.load(tmp_path / "out").logp(x_BTF, len_B).x
    torch.testing.assert_close(merged, live, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(live, bare, atol=1e-4)


def test_a_size_is_exported_with_what_voices_of_the_whole_need(
    supernet: Path, voice: Voice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def noted(recogniser: Recogniser, folder: Path, *, int8: bool, voices: VoiceInput | None) -> Exported:
        asked.update(layers=len(recogniser.model.encoder.layers), voices=voices)
        return Exported(model=folder, tokens=folder, parity=0.0, int8=None, bytes=0, int8_bytes=None)

    monkeypatch.setattr(recipe, "export_onnx", noted)
    recipe.export(supernet, tmp_path, size="40", voices=[voice])
    put = asked["voices"]
    assert asked["layers"] == 2 and put.layers == (0, 2) and put.base == voice.base and put.voices == (voice,)
    assert set(put.sites) == {f"{i}.{role}" for i in range(3) for role in ("ff1.up", "attention.out")}
    assert "encoder.layers.0.feed_forward1.linear1.weight" in put.slices
    recipe.export(supernet, tmp_path, size="40")
    assert asked["voices"] is None
    foreign = Voice(method=voice.method, tensors=voice.tensors, base="b" * 64, tokenizer=voice.tokenizer)
    with pytest.raises(VoiceError, match="was made for the base bbbbbbbbbbbb"):
        recipe.export(supernet, tmp_path, voices=[foreign])


def test_an_extracted_size_is_no_base(supernet: Path, voice: Voice, tmp_path: Path) -> None:
    Recogniser.load(supernet).save(tmp_path / "small")
    (tmp_path / "small" / SUBNET).write_text("{}")
    for work in (recipe.export_merged, recipe.export_peft):
        with pytest.raises(UsageError, match="is one extracted size; give the model that it was taken from"):
            work(tmp_path / "small", tmp_path / "out", voice)
    assert not (tmp_path / "out").exists()
