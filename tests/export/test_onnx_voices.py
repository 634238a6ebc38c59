"""One ONNX file serves every voice, mixed in a batch, on a size as on the whole, and without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from manyvoice.decode.evaluate import greedy_decoder
from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.extract import extract
from manyvoice.elastic.narrow import Elastic, Plan
from manyvoice.elastic.subnet import uniform
from manyvoice.errors import UsageError, VoiceError, WorkError
from manyvoice.export import onnx as export
from manyvoice.export.flat import VoiceInput, flat, fresh, layout_of, write_flat
from manyvoice.export.onnx import Exported, check_parity, export_onnx, onnx_recogniser
from manyvoice.models.anatomy import Anatomy, Site, anatomy_of
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.method import Edit, Part, make_method
from manyvoice.submodels.voice import Voice

pytest.importorskip("onnx")
pytestmark = pytest.mark.timeout(400)  # exporting takes a minute where the cores have other work

MakeVoice = Callable[..., Voice]
LORA = {"rank": 4, "roles": ("ff1.up", "ff1.down", "attention.value", "attention.out")}
LENGTHS = [90, 61, 44, 77]


@pytest.fixture(scope="module")
def size(base: Recogniser) -> tuple[Recogniser, Plan]:
    """The last of three layers, half of the heads, three of four feed-forward chunks."""
    elastic = Elastic(base.model)
    subnet = uniform(elastic.anatomy, "x", [2], {"head": 2, "ff_chunk": 3})
    small = Recogniser(extract(elastic, subnet), base.family, base.tokenizer, base.log_mel)
    return small, elastic.plan(subnet)


@pytest.fixture(scope="module")
def three(base: Recogniser, make_voice: MakeVoice) -> tuple[Voice, ...]:
    return tuple(make_voice(base, "lora", seed, **LORA) for seed in range(3))


def input_of(base: Recogniser, plan: Plan, voices: tuple[Voice, ...]) -> VoiceInput:
    return VoiceInput(
        method=voices[0].method, anatomy=anatomy_of(base.model), base=base.fingerprint(), layers=plan.layers,
        slices=plan.slices, voices=voices,
    )  # fmt: skip


@pytest.fixture(scope="module")
def phone(
    base: Recogniser, size: tuple[Recogniser, Plan], three: tuple[Voice, ...], tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    small, plan = size
    folder = tmp_path_factory.mktemp("voices") / "phone"
    return export_onnx(small, folder, int8=True, voices=input_of(base, plan, three))


def sound() -> tuple[Tensor, Tensor]:
    len_B = torch.tensor(LENGTHS)
    return torch.randn(4, 90, 80) * (torch.arange(90) < len_B[:, None])[:, :, None], len_B


def live(base: Recogniser, size: tuple[Recogniser, Plan], voices: tuple[Voice, ...], owners: list[int]) -> Any:
    """Torch's answer from a bank on the size."""
    small, plan = size
    bank = Bank(anatomy_of(base.model), voices[0].method, [v.hash for v in voices], empty=True)
    for row, voice in enumerate(voices, 1):
        bank.put(row, voice.tensors)
    with bank.on(small.model, torch.tensor(owners), layers=plan.layers, slices=plan.slices):
        return small.logp(*sound_again())


def sound_again() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return sound()


def run(path: Path, x_BTF: Tensor, len_B: Tensor, voice_BP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    fed = {"audio_signal": x_BTF.transpose(1, 2).contiguous().numpy(), "length": len_B.numpy(), "voice": voice_BP}
    logp, lengths = session.run(["logprobs", "lengths"], fed)
    return logp, lengths


def rows_of(base: Recogniser, voices: tuple[Voice, ...], owners: list[int]) -> np.ndarray:
    layout = layout_of(voices[0].method, anatomy_of(base.model))
    table = np.stack([np.zeros(layout[-1].stop, np.float32), *[flat(v, layout) for v in voices]])
    return table[owners]


def test_a_mixed_batch_is_torch_and_is_one_at_a_time(
    base: Recogniser, size: tuple[Recogniser, Plan], three: tuple[Voice, ...], phone: Exported
) -> None:
    owners = [3, 0, 1, 2]
    expected = live(base, size, three, owners)
    x_BTF, len_B = sound_again()
    bare = size[0].logp(x_BTF, len_B).x
    rows = rows_of(base, three, owners)
    found, lengths = run(phone.model, x_BTF, len_B, rows)
    assert lengths.tolist() == expected.len_B.tolist() and phone.parity < 1e-4
    for b, n in enumerate(lengths):
        torch.testing.assert_close(torch.from_numpy(found[b, :n]), expected.x[b, :n], atol=1e-4, rtol=0)
        alone, _ = run(phone.model, x_BTF[b : b + 1, : LENGTHS[b]], len_B[b : b + 1], rows[b : b + 1])
        np.testing.assert_allclose(alone[0], found[b, :n], atol=1e-4, rtol=0)
        apart = float(np.abs(found[b, :n] - bare[b, :n].numpy()).max())
        assert apart < 1e-4 if owners[b] == 0 else apart > 1e-2


def test_int8_takes_the_same_voices(
    base: Recogniser, size: tuple[Recogniser, Plan], three: tuple[Voice, ...], phone: Exported
) -> None:
    assert phone.int8 is not None and phone.int8_bytes is not None and phone.int8_bytes < phone.bytes
    x_BTF, len_B = sound_again()
    for b, owner in enumerate([3, 1, 1, 2]):  # alone: one scale for the activations of a batch couples its utterances
        one = x_BTF[b : b + 1, : LENGTHS[b]], len_B[b : b + 1]
        with_voice, without = rows_of(base, three, [owner]), rows_of(base, three, [0])
        exact, _ = run(phone.model, *one, with_voice)
        small, _ = run(phone.int8, *one, with_voice)
        bare, _ = run(phone.model, *one, without)
        error, effect = (float(np.abs(exact - other).mean()) for other in (small, bare))
        assert error < 0.5 * effect, "quantised, the voice is lost"


def test_the_folder_says_how_a_row_is_made(base: Recogniser, three: tuple[Voice, ...], phone: Exported) -> None:
    import onnx

    folder = phone.model.parent
    told = json.loads((folder / "voices.json").read_text())
    assert [v["hash"] for v in told["voices"]] == [v.hash for v in three]
    assert (told["base"], told["tokenizer"]) == (base.fingerprint(), base.tokenizer.fingerprint())
    for voice, row in zip(three, told["voices"], strict=True):
        numbers = np.load(folder / row["file"])
        assert numbers.dtype == np.float32 and numbers.shape == (told["numbers"],)
        for key, part, shape, offset in told["layout"]:
            cut = numbers[offset : offset + int(np.prod(shape))].reshape(shape)
            assert np.array_equal(cut, voice.tensors[key, part].numpy())
    assert [entry[:2] for entry in told["layout"][:2]] == [["0.ff1.up", "A"], ["0.ff1.up", "B"]]
    inside = {p.key: p.value for p in onnx.load(str(phone.model)).metadata_props}
    assert json.loads(inside["voices"]) == {k: v for k, v in told.items() if k != "voices"}
    assert make_method(told["method"], told["settings"]) == three[0].method


def test_the_snippet_of_the_docs_runs_without_torch(
    base: Recogniser, size: tuple[Recogniser, Plan], three: tuple[Voice, ...], phone: Exported, tmp_path: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "voices-elsewhere.md").read_text(encoding="utf-8")
    code = next(c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnxruntime" in c)
    code += "import sys\nassert not {'torch', 'manyvoice'} & set(sys.modules)\n"
    (tmp_path / "phone-onnx").symlink_to(phone.model.parent)
    rate = base.log_mel.rate
    said_N = (3000 * np.random.default_rng(0).standard_normal(rate)).astype("<i2")
    with wave.open(str(tmp_path / "talk.wav"), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(said_N.tobytes())
    code += "np.save('heard.npy', mel)\n"
    words = [sys.executable, "-X", "utf8", "-c", code]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    x_TF = base.log_mel(said_N / np.float32(32768))
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "heard.npy")).T, x_TF, atol=1e-3, rtol=1e-3)
    small, plan = size
    bank = Bank(anatomy_of(base.model), three[0].method, ["ann"], empty=True)
    bank.put(1, three[0].tensors)
    with bank.on(small.model, torch.tensor([1, 0]), layers=plan.layers, slices=plan.slices):
        texts = greedy_decoder(small)(small.logp(torch.stack([x_TF, x_TF]), torch.full((2,), len(x_TF))))
    assert done.stdout.split("\n")[:2] == texts and texts[0] != texts[1]


def test_a_recogniser_of_the_file_speaks_with_a_voice(
    base: Recogniser, size: tuple[Recogniser, Plan], three: tuple[Voice, ...], phone: Exported
) -> None:
    vector_P = flat(three[1], layout_of(three[1].method, anatomy_of(base.model)))
    with_voice = onnx_recogniser(phone.model, size[0], voice_P=vector_P).logp(*sound_again())
    expected = live(base, size, three, [2, 2, 2, 2])
    torch.testing.assert_close(with_voice.x[0], expected.x[0], atol=1e-4, rtol=0)
    bare = onnx_recogniser(phone.model, size[0]).logp(*sound_again())
    torch.testing.assert_close(bare.x[0], size[0].logp(*sound_again()).x[0], atol=1e-4, rtol=0)
    short = onnx_recogniser(phone.model, size[0], voice_P=vector_P[:-1])
    with pytest.raises(VoiceError, match=rf"takes voices of {len(vector_P)} numbers, but this one has"):
        short.logp(*sound_again())


def test_bare_numbers_for_runtimes_without_numpy(base: Recogniser, three: tuple[Voice, ...], tmp_path: Path) -> None:
    layout = layout_of(three[0].method, anatomy_of(base.model))
    path = write_flat(three[0], layout, tmp_path / "ann.bin")
    assert path.stat().st_size == 4 * layout[-1].stop
    assert np.array_equal(np.fromfile(path, "<f4"), flat(three[0], layout))
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match="cannot be written"):
        write_flat(three[0], layout, tmp_path / "file" / "ann.bin")
    with pytest.raises(UsageError, match="is a file; name another folder"):
        export_onnx(base, tmp_path / "file")
    with pytest.raises(WorkError, match="cannot be written"):
        export_onnx(base, tmp_path / "file" / "phone")


def test_a_graph_that_edits_otherwise_is_not_written(
    base: Recogniser, size: tuple[Recogniser, Plan], three: tuple[Voice, ...], phone: Exported,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def of_another_strength(scores: Any, bins: int, path: Path) -> None:
        path.write_bytes(phone.model.read_bytes())

    monkeypatch.setattr(export, "_export", of_another_strength)
    put = input_of(base, size[1], three)
    stronger = replace(put, method=make_method("lora", LORA | {"alpha": 64.0}), voices=())
    with pytest.raises(WorkError, match=r"differ from torch by .* so it is not written"):
        export_onnx(size[0], tmp_path / "out", voices=stronger)
    assert not list((tmp_path / "out").iterdir())


def test_every_voice_that_is_given_is_tried(
    base: Recogniser, size: tuple[Recogniser, Plan], three: tuple[Voice, ...], phone: Exported
) -> None:
    """A file that is right but for the last of twenty voices is found out."""
    put = input_of(base, size[1], three)
    scores = export._Scores(size[0], put)
    rows_KP = torch.cat([torch.zeros(1, put.layout[-1].stop), fresh(put, count=20)])
    assert check_parity(phone.model, scores, 80, rows_KP) < 1e-4
    forward, last = scores.forward, rows_KP[-1]

    def wrong_for_the_last(x: Tensor, n: Tensor, voice_BP: Tensor) -> tuple[Tensor, Tensor]:
        return forward(x, n, voice_BP * ~(voice_BP == last).all(1, keepdim=True))

    scores.forward = wrong_for_the_last  # type: ignore[method-assign]
    with pytest.raises(WorkError, match="differ from torch"):
        check_parity(phone.model, scores, 80, rows_KP)


@dataclass(frozen=True, kw_only=True)
class Plain(Edit):
    """Replaces a gain by its own, so that zeros silence the site."""

    name: ClassVar[str] = "plain"

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        return tuple(s for s in anatomy.sites if s.role == "block")

    def parts(self, site: Site) -> dict[str, Part]:
        return {"gain": Part(shape=(site.width_out,), start="ones", identity="ones", writes=0)}

    def edit(self, tensors: Mapping[str, Tensor], x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        return y_BTO * tensors["gain"][:, None]


def test_what_cannot_be_fed_is_refused(
    base: Recogniser, make_voice: MakeVoice, three: tuple[Voice, ...], tmp_path: Path
) -> None:
    whole: dict[str, Any] = {"anatomy": anatomy_of(base.model), "base": base.fingerprint()}
    with pytest.raises(VoiceError, match="method generated: its voices share tensors.*adapter"):
        VoiceInput(method=make_method("generated"), **whole)
    with pytest.raises(VoiceError, match=r"method plain: with zeros .* changes what 0\.block computes"):
        VoiceInput(method=Plain(), **whole)
    other = make_voice(base, "lora")
    with pytest.raises(VoiceError, match="but this export takes lora .*export the others by themselves"):
        VoiceInput(method=three[0].method, voices=(three[0], other), **whole)
    foreign = Voice(method=other.method, tensors=other.tensors, base="b" * 64, tokenizer=other.tokenizer)
    with pytest.raises(VoiceError, match="was made for the base bbbbbbbbbbbb"):
        export_onnx(base, tmp_path / "out", voices=VoiceInput(method=other.method, voices=(foreign,), **whole))
    with pytest.raises(VoiceError, match="tensors that are not the .* of this layout"):
        flat(other, layout_of(make_method("scale"), anatomy_of(base.model)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter", "scale"])
def test_other_methods_on_the_whole_model(base: Recogniser, make_voice: MakeVoice, name: str, tmp_path: Path) -> None:
    voices = tuple(make_voice(base, name, seed) for seed in range(2))
    put = VoiceInput(
        method=voices[0].method, anatomy=anatomy_of(base.model), base=base.fingerprint(), voices=voices
    )  # fmt: skip
    made = export_onnx(base, tmp_path / name, int8=True, voices=put)
    assert made.parity < 1e-4 and made.int8 is not None
    owners = [1, 0, 2, 1]
    expected = live(base, (base, Plan(layers=(0, 1, 2))), voices, owners)
    x_BTF, len_B = sound_again()
    found, lengths = run(made.model, x_BTF, len_B, rows_of(base, voices, owners))
    every = rows_of(base, voices, [0, 1, 2])
    for b, n in enumerate(lengths):
        torch.testing.assert_close(torch.from_numpy(found[b, :n]), expected.x[b, :n], atol=1e-4, rtol=0)
        one = x_BTF[b : b + 1, : LENGTHS[b]], len_B[b : b + 1]
        answers = [torch.from_numpy(run(made.int8, *one, every[k : k + 1])[0][0]) for k in range(3)]
        # int8 is coarse, on some processors more than on others, yet far nearer to its voice than the other voices are
        off = [float((answer - expected.x[b, :n]).abs().mean()) for answer in answers]
        mine = off.pop(owners[b])
        assert mine < 0.15 * min(off), (mine, off)
