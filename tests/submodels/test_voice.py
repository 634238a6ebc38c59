"""A voice file says what it is, is called by its content, and anything wrong with it is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from manyvoice.errors import VoiceError
from manyvoice.models.anatomy import anatomy_of
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.method import make_method, methods
from manyvoice.submodels.voice import Voice, read_metadata

BASE, TOKENIZER = "b" * 64, "d" * 64


@pytest.fixture(params=sorted(methods()))
def voice(request: pytest.FixtureRequest, base: PreTrainedModel) -> Voice:
    bank = Bank(anatomy_of(base), make_method(request.param), ["ann"])
    return Voice(
        method=bank.method.alone(), tensors=bank.take(1), base=BASE, tokenizer=TOKENIZER, card={"speaker": "Änn"}
    )


def test_what_is_written_is_what_is_read(voice: Voice, base: PreTrainedModel, tmp_path: Path) -> None:
    again = Voice.read(voice.write(tmp_path / "ann.safetensors"))
    assert again.hash == voice.hash and again.method == voice.method and again.card == {"speaker": "Änn"}
    assert all(torch.equal(t, again.tensors[where]) for where, t in voice.tensors.items())
    assert again.check(anatomy_of(base), base=BASE, tokenizer=TOKENIZER) is again
    twin = Voice(method=voice.method, tensors=dict(reversed(voice.tensors.items())), base=BASE, tokenizer=TOKENIZER,
                 card=voice.card)  # fmt: skip
    assert twin.hash == voice.hash
    half = len(voice.data) // 2
    assert read_metadata(voice.data[: max(half, 20_000)], "x")["method"] == voice.method.name


def test_a_file_that_was_touched_is_refused(voice: Voice, tmp_path: Path) -> None:
    data = voice.data
    with pytest.raises(VoiceError, match=r"ann: is no voice"):
        Voice.from_bytes(data[:-5], "ann")
    with pytest.raises(VoiceError, match=r"ann: is no voice file, or not written to its end"):
        Voice.from_bytes(data[:30], "ann")
    with pytest.raises(VoiceError, match="it was changed, or not written to its end"):
        Voice.from_bytes(data[:-1] + bytes([data[-1] ^ 1]), "ann", hash=voice.hash)
    for touched in (data[:-1] + bytes([data[-1] ^ 1]), data.replace("Änn".encode(), b"Ann!")):
        assert len(touched) == len(data)
        (tmp_path / "touched").write_bytes(touched)
        with pytest.raises(VoiceError, match="touched: was changed since it was written"):
            Voice.read(tmp_path / "touched")
    with pytest.raises(VoiceError, match="cannot be read"):
        Voice.read(tmp_path / "none.safetensors")


def test_what_does_not_fit_is_refused(voice: Voice, base: PreTrainedModel) -> None:
    anatomy = anatomy_of(base)
    with pytest.raises(VoiceError, match="was made for the base bbbbbbbbbbbb, but this model is cccccccccccc"):
        voice.check(anatomy, base="c" * 64, tokenizer=TOKENIZER)
    with pytest.raises(VoiceError, match="was made for the tokenizer dddddddddddd"):
        voice.check(anatomy, base=BASE, tokenizer="e" * 64)
    (key, part), tensor = next(iter(voice.tensors.items()))
    wrong = Voice(method=voice.method, tensors={**voice.tensors, (key, part): tensor[:-1]}, base=BASE,
                  tokenizer=TOKENIZER)  # fmt: skip
    with pytest.raises(VoiceError, match=f"does not fit the model at {key}, {part}"):
        wrong.check(anatomy, base=BASE, tokenizer=TOKENIZER)


def test_numbers_that_are_not_finite_are_refused(voice: Voice) -> None:
    where, tensor = next(iter(voice.tensors.items()))
    bad = Voice(method=voice.method, tensors={**voice.tensors, where: tensor * float("nan")}, base=BASE,
                tokenizer=TOKENIZER)  # fmt: skip
    with pytest.raises(VoiceError, match="not finite"):
        _ = bad.data
    with pytest.raises(VoiceError, match=r"ann: .* holds numbers that are not finite"):
        Voice.from_bytes(save({"0.block/up": torch.tensor([float("inf")])}, {"manyvoice": metadata()}), "ann")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"base": 5}, "must be text"),
        ({"tokenizer": None}, "must be text"),
        ({"card": "x"}, "must be text, and its card an object"),
        ({"settings": [1]}, "no voice that this version can read"),
        ({"settings": {"roles": None}}, "roles = None; must be of the kind of"),
        ({"settings": {"roles": [["a"]]}}, "roles = "),
        ({"method": "lora", "settings": {"alpha": float("inf")}}, "alpha = inf; .* finite"),
        ({"method": "lora", "settings": {"rank": 2.0}}, "rank = 2.0; must be of the kind of 8"),
        ({"method": "lora", "settings": {"rank": True}}, "rank = True"),
    ],
)
def test_crafted_words_are_refused_as_the_file_is_read(more: dict[str, Any], message: str) -> None:
    with pytest.raises(VoiceError, match=message):
        Voice.from_bytes(save({"0.block/up": torch.zeros(1)}, {"manyvoice": metadata(**more)}), "x")


def test_numbers_must_be_fractions_that_the_model_can_hold() -> None:
    for tensor, message in (
        (torch.tensor([1e300], dtype=torch.float64), "not finite"),
        (torch.ones(1, dtype=torch.int8), "no fractions"),
    ):
        with pytest.raises(VoiceError, match=message):
            Voice.from_bytes(save({"0.block/up": tensor}, {"manyvoice": metadata()}), "x")


def metadata(**more: Any) -> str:
    return json.dumps(
        {"format": "voice.v1", "method": "scale", "settings": {}, "base": BASE, "tokenizer": TOKENIZER, "card": {}}
        | more
    )


def test_foreign_files_are_refused() -> None:
    tensors = {"0.block/up": torch.zeros(1)}
    with pytest.raises(VoiceError, match="x: holds no tensors"):
        Voice.from_bytes(save({}, {"manyvoice": metadata()}), "x")
    with pytest.raises(VoiceError, match="is no voice file"):
        Voice.from_bytes(save(tensors), "x")
    with pytest.raises(VoiceError, match=r"format 'voice\.v9', but this version reads voice\.v1"):
        Voice.from_bytes(save(tensors, {"manyvoice": metadata(format="voice.v9")}), "x")
    with pytest.raises(VoiceError, match="method 'prompt': there are"):
        Voice.from_bytes(save(tensors, {"manyvoice": metadata(method="prompt")}), "x")
