"""LoRA voices in PEFT's layout: there and back exactly, and what a voice cannot be is refused by name."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyvoice.decode.recogniser import Recogniser
from manyvoice.errors import VoiceError
from manyvoice.export.peft import CONFIG, WEIGHTS, from_peft, to_peft
from manyvoice.models.anatomy import anatomy_of
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.voice import Voice

MakeVoice = Callable[..., Voice]


def back(folder: Path, base: Recogniser, **more: Any) -> Voice:
    given = {"base": base.fingerprint(), "tokenizer": base.tokenizer.fingerprint()} | more
    return from_peft(folder, base.model, **given)


@pytest.fixture
def folder(base: Recogniser, make_voice: MakeVoice, tmp_path: Path) -> Path:
    return to_peft(make_voice(base, "lora", rank=4), base.model, tmp_path / "peft")


def rewrite(folder: Path, **entries: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | entries))


@pytest.mark.parametrize(
    "roles",
    [
        ("attention.out", "ff1.up"),
        ("attention.query", "attention.value", "attention.out"),
        ("attention.out", "attention.value", "attention.query"),
    ],
)
def test_there_and_back_is_the_same_file(
    base: Recogniser, make_voice: MakeVoice, tmp_path: Path, roles: tuple[str, ...]
) -> None:
    voice = make_voice(base, "lora", 3, rank=4, alpha=6.0, roles=roles)
    again = back(to_peft(voice, base.model, tmp_path / "x", base_model="me/base"), base)
    assert again.hash == voice.hash
    config = json.loads((tmp_path / "x" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6.0, "me/base")
    tensors = load_file(tmp_path / "x" / WEIGHTS)
    assert len(tensors) == 2 * 3 * len(roles) and len(config["target_modules"]) == 3 * len(roles)
    wide = tensors["base_model.model.encoder.layers.1.self_attn.o_proj.lora_A.weight"]
    assert wide.shape == (4, 16) and torch.equal(wide, voice.tensors["1.attention.out", "A"].T)


def test_a_folder_of_pefts_own_becomes_a_voice(base: Recogniser, folder: Path) -> None:
    """No metadata of ours; target_modules by their last names; entries that PEFT always writes."""
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors, str(folder / WEIGHTS), {"format": "pt"})
    rewrite(folder, target_modules=["q_proj", "v_proj", "o_proj"], lora_alpha=16, qalora_group_size=16,
            megatron_core="megatron.core", rank_pattern={}, use_dora=False, init_lora_weights=True)  # fmt: skip
    voice = back(folder, base, card={"speaker": "ann"})
    assert voice.method.settings()["roles"] == ("attention.query", "attention.value", "attention.out")
    assert voice.card == {"speaker": "ann"} and voice.method.settings()["alpha"] == 16.0
    assert voice.check(anatomy_of(base.model), base=base.fingerprint(), tokenizer=voice.tokenizer) is voice


def test_stock_peft_gives_our_logits(base: Recogniser, make_voice: MakeVoice, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'manyvoice[peft]'")
    from transformers import AutoModelForCTC

    voice = make_voice(base, "lora", rank=4)
    base.save(tmp_path / "model")
    to_peft(voice, base.model, tmp_path / "adapter")
    stock = AutoModelForCTC.from_pretrained(tmp_path / "model").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says of itself
        theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    bank = Bank(anatomy_of(base.model), voice.method, ["one"], empty=True)
    bank.put(1, voice.tensors)
    x_BTF, len_B = torch.randn(1, 70, 80), torch.tensor([70])
    with torch.no_grad():
        logits = theirs(x_BTF, attention_mask=torch.ones(1, 70, dtype=torch.bool)).logits
    with bank.on(base.model, torch.tensor([1])):
        ours = base.logp(x_BTF, len_B).x
    torch.testing.assert_close(logits.log_softmax(-1), ours, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, base.logp(x_BTF, len_B).x, atol=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "saved")
    again = back(tmp_path / "saved", base)
    assert again.method == voice.method
    assert all(torch.equal(t, again.tensors[where]) for where, t in voice.tensors.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_rslora", True), ("use_dora", True), ("bias", "all"), ("modules_to_save", ["ctc_head"]),
        ("rank_pattern", {"q_proj": 2}), ("alpha_pattern", {"q_proj": 2}), ("fan_in_fan_out", True),
        ("lora_bias", True), ("layer_replication", [[0, 1]]), ("init_lora_weights", "pissa"),
        ("init_lora_weights", "lora_ga"),
        ("something_of_tomorrow", 3),
    ],
)  # fmt: skip
def test_settings_that_a_voice_cannot_have_are_refused(base: Recogniser, folder: Path, name: str, value: Any) -> None:
    rewrite(folder, **{name: value})
    with pytest.raises(VoiceError, match=rf"adapter_config\.json: {name} = "):
        back(folder, base)


def test_damaged_and_foreign_folders_are_refused(base: Recogniser, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    first = "base_model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(match: str, change: dict[str, torch.Tensor], **metadata: str) -> None:
        save_file(change, str(folder / WEIGHTS), metadata or None)
        with pytest.raises(VoiceError, match=match):
            back(folder, base)

    refused("q_proj is missing, but must be", {n: t for n, t in tensors.items() if n != first})
    refused(r"q_proj is \[2, 16\], but must be \[4, 16\]", tensors | {first: tensors[first][:2].clone()})
    refused("holds numbers that are not finite", tensors | {first: tensors[first] * float("nan")})
    refused("ctc_head.weight .* is no lora_A", tensors | {"base_model.model.ctc_head.weight": torch.zeros(2, 2)})
    other = "base_model.model.encoder.layers.7.self_attn.q_proj.lora_A.weight"
    refused(r"module encoder\.layers\.7\.self_attn\.q_proj is no site", tensors | {other: torch.zeros(4, 16)})
    refused("holds no tensors", {})
    refused("metadata are no voice's", tensors, manyvoice='{"card": 3}')
    refused("was made for the base cccccccccccc", tensors, manyvoice=json.dumps({"base": "c" * 64}))
    (folder / WEIGHTS).unlink()
    with pytest.raises(VoiceError, match=r"pickled adapters \(\.bin\) are not loaded"):
        back(folder, base)
    for entries, match in (({"r": "many"}, "r and lora_alpha must be numbers"), ({"peft_type": "IA3"}, "must be LORA")):
        save_file(tensors, str(folder / WEIGHTS))
        good = copy.copy((folder / CONFIG).read_text())
        rewrite(folder, **entries)
        with pytest.raises(VoiceError, match=match):
            back(folder, base)
        (folder / CONFIG).write_text(good)
    with pytest.raises(VoiceError, match="cannot be read"):
        back(tmp_path / "nowhere", base)


def test_other_methods_have_no_form_in_peft(base: Recogniser, make_voice: MakeVoice, tmp_path: Path) -> None:
    with pytest.raises(VoiceError, match="method scale has no form in PEFT, only lora has"):
        to_peft(make_voice(base, "scale"), base.model, tmp_path / "x")


def test_a_voice_of_another_base_is_not_written(base: Recogniser, make_voice: MakeVoice, tmp_path: Path) -> None:
    with pytest.raises(VoiceError, match="was made for the base bbbbbbbbbbbb, but this model is"):
        to_peft(replace(make_voice(base, "lora", rank=4), base="b" * 64), base.model, tmp_path / "x")
    other = copy.deepcopy(base.model)
    other.ctc_head.weight.data[0, 0] += 1
    with pytest.raises(VoiceError, match="was made for the base"):
        to_peft(make_voice(base, "lora", rank=4), other, tmp_path / "x")
    assert not (tmp_path / "x").exists()
