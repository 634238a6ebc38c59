"""A space's file: what comes back is what was trained, and what was changed, or is of another base, is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from manyvoice.errors import UsageError, VoiceError
from manyvoice.models.anatomy import anatomy_of
from manyvoice.models.load import build_model
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.generator import FILE, Generator, SpaceAdamW, generator_of, own_of
from manyvoice.submodels.method import make_method
from manyvoice.submodels.predict import EXAMPLES, Heard, fit_predictor
from manyvoice.submodels.voice import Voice
from manyvoice.train.objective import scores_of
from manyvoice.types import Batch

SPEAKERS = ["ann", "bob", "cem", "dora", "emil"]


@pytest.fixture(params=["generated", "mixture"])
def bank(request: pytest.FixtureRequest, base: PreTrainedModel) -> Bank:
    """Rows and shared tensors that say something."""
    sizes = {"generated": {"dim": 3, "rank": 2}, "mixture": {"basis": 2, "rank": 2}}[request.param]
    bank = Bank(anatomy_of(base), make_method(request.param, sizes), SPEAKERS, dtype=torch.float64)
    gen = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in bank.parameters():
            p[1:] += 0.3 * torch.randn(p[1:].shape, generator=gen, dtype=p.dtype)
        for p in bank.shared.values():
            p.add_(0.3 * torch.randn(p.shape, generator=gen, dtype=p.dtype))
    return bank


@pytest.fixture
def space(bank: Bank) -> Generator:
    own_SE = own_of(bank).detach().numpy()
    x_SMN = np.random.default_rng(0).normal(size=(len(own_SE), EXAMPLES, 4))
    predictor = fit_predictor(x_SMN, own_SE, ["encoder.layers.0"])
    return generator_of(bank, own_SE, base="b" * 64, tokenizer="t", predictor=predictor, card={"seconds": 9.5})


@torch.no_grad()
def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    return scores_of(model, batch).x


def test_a_place_in_the_space_that_is_read_is_the_live_row(
    bank: Bank, space: Generator, base: PreTrainedModel, batch: Batch, tmp_path: Path
) -> None:
    """And so is the voice that it settles to, in a bank of its own method."""
    with bank.on(base, torch.tensor([2, 0, 5])):
        live = logits(base, batch)
    read = Generator.read(space.write(tmp_path).parent).check(anatomy_of(base), base="b" * 64, tokenizer="t")
    again = read.bank(anatomy_of(base), ["x", "y"], dtype=torch.float64)
    for row, owner in ((1, 2), (2, 5)):
        read.place(again, row, own_of(bank, [owner]).detach().numpy()[0])
    with again.on(base, torch.tensor([1, 0, 2])):
        assert torch.equal(logits(base, batch), live)
    alone = Bank(anatomy_of(base), read.method.alone(), ["x", "y"], empty=True, dtype=torch.float64)
    for row in (1, 2):
        voice = Voice.read(read.voice(again, row, {"speaker": "x"}).write(tmp_path / f"{row}.safetensors"))
        voice.check(anatomy_of(base), base="b" * 64, tokenizer="t")
        assert voice.card == {"speaker": "x", "space": space.hash, "shared": True}
        alone.put(row, voice.tensors)
    with alone.on(base, torch.tensor([1, 0, 2])):
        torch.testing.assert_close(logits(base, batch), live, rtol=0, atol=1e-11)


def test_what_is_read_is_what_was_written(space: Generator, tmp_path: Path) -> None:
    path = space.write(tmp_path / "deep" / "folder")
    read = Generator.read(path)
    assert path.name == FILE and read.hash == space.hash and read.data == space.data == path.read_bytes()
    assert read.method == space.method and read.card == {"seconds": 9.5, "speakers": 5}
    assert np.array_equal(read.mean, space.mean) and np.array_equal(read.covariance, space.covariance)
    assert space.predictor is not None and read.predictor is not None
    part = Heard(1, np.ones(2), np.ones(2))
    assert np.array_equal(read.predictor([part]), space.predictor([part]))
    assert not any(name.encode() in space.data for name in SPEAKERS[2:]), "nobody's name is in it"


def test_owners_start_at_the_mean_and_what_is_shared_is_frozen(space: Generator, base: PreTrainedModel) -> None:
    bank = space.bank(anatomy_of(base), ["x"], dtype=torch.float64)
    assert np.array_equal(own_of(bank).detach().numpy()[0], space.mean)
    assert not any(p.requires_grad for p in bank.shared.values())
    for wrong in (space.mean[:-1], np.full_like(space.mean, np.nan)):
        with pytest.raises(VoiceError, match="finite numbers"):
            space.place(bank, 1, wrong)


def test_all_numbers_vary_with_fewer_speakers_than_numbers(space: Generator) -> None:
    E, S = len(space.mean), len(SPEAKERS)
    few = replace(space, covariance=np.diag([1.0, *[0.0] * (E - 1)]))
    assert few.spread == pytest.approx(E**-0.5)
    share = E / (E + S)
    expected = np.diag([1 - share, *[0.0] * (E - 1)]) + share / E * np.eye(E)
    np.testing.assert_allclose(few.axes @ few.axes.T, expected, atol=1e-12)
    everyone_alike = replace(space, covariance=np.zeros((E, E)))
    assert np.isfinite(everyone_alike.axes).all()


def test_steps_are_in_standard_deviations(space: Generator, base: PreTrainedModel) -> None:
    """A first step of Adam is a rate along every axis of the speakers, whatever the scale of the numbers."""
    bank = space.bank(anatomy_of(base), ["x", "y"], dtype=torch.float64)
    optimizer = SpaceAdamW(space, bank, 0.25)
    gen = torch.Generator().manual_seed(0)
    grads = [torch.randn(1, *p.shape[1:], generator=gen, dtype=torch.float64) for p in bank.parameters()]
    optimizer.step_rows(torch.tensor([2]), grads, scale=0.5)
    own = own_of(bank).detach()
    assert np.array_equal(own[0].numpy(), space.mean)
    slope = torch.cat([g.flatten(1) for g in grads], 1)[0] @ torch.from_numpy(space.axes)
    torch.testing.assert_close(space.standard(own[1:])[0], -0.125 * slope.sign(), rtol=1e-4, atol=1e-9)


def rewritten(path: Path, document: dict[str, object], tensors: dict[str, Tensor] | None = None) -> Path:
    """The file with some of its metadata or tensors replaced."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    said = json.loads(header["__metadata__"]["manyvoice"]) | document
    save_file(load_file(path) | (tensors or {}), path, {"manyvoice": json.dumps(said)})
    return path


def test_what_was_changed_is_refused(space: Generator, tmp_path: Path) -> None:
    path = space.write(tmp_path)
    data = path.read_bytes()
    for place in (len(data) - 3, len(data) // 2):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(VoiceError, match="was changed since it was written"):
            Generator.read(path)
    for cut in (4, 100, len(data) - 8):
        path.write_bytes(data[:cut])
        with pytest.raises(VoiceError, match=r"is no space|no space that this version can read"):
            Generator.read(path)
    path.write_bytes(data)
    with pytest.raises(VoiceError, match="was changed since it was written"):
        Generator.read(rewritten(path, {"base": "c" * 64}))
    path.write_bytes(data)
    with pytest.raises(VoiceError, match="was changed since it was written"):
        Generator.read(rewritten(path, {}, {"own/mean": torch.zeros(len(space.mean)).double()}))
    path.write_bytes(data)
    with pytest.raises(VoiceError, match=r"format 'generator\.v9'"):
        Generator.read(rewritten(path, {"format": "generator.v9"}))
    with pytest.raises(VoiceError, match="cannot be read"):
        Generator.read(tmp_path / "nowhere")


def test_numbers_that_are_not_finite_are_not_written(space: Generator, tmp_path: Path) -> None:
    with pytest.raises(VoiceError, match="own/mean holds numbers that are not finite"):
        replace(space, mean=np.full_like(space.mean, np.inf)).write(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_another_base_is_refused(space: Generator, base: PreTrainedModel) -> None:
    anatomy = anatomy_of(base)
    with pytest.raises(VoiceError, match="was made for the base bbbbbbbbbbbb, but this model is cccc"):
        space.check(anatomy, base="c" * 64, tokenizer="t")
    with pytest.raises(VoiceError, match="was made for the tokenizer t, but this model has u"):
        space.check(anatomy, base="b" * 64, tokenizer="u")
    shallow, _ = build_model("tiny", {"num_hidden_layers": 1}, vocabulary=9, blank=8)
    with pytest.raises(VoiceError, match="does not fit the model at"):
        space.check(anatomy_of(shallow), base="b" * 64, tokenizer="t")
    with pytest.raises(VoiceError, match="numbers, but it has statistics of"):
        replace(space, mean=space.mean[:-1]).check(anatomy, base="b" * 64, tokenizer="t")


def test_voices_that_share_nothing_have_no_space(base: PreTrainedModel) -> None:
    bank = Bank(anatomy_of(base), make_method("adapter"), ["x"])
    with pytest.raises(UsageError, match="share nothing"):
        generator_of(bank, np.zeros((1, 3)), base="b", tokenizer="t")
