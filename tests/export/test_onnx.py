"""ONNX gives torch's answers for any batch and length, runs without torch, and sherpa-onnx reads it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from manyvoice.cli import app
from manyvoice.config import make_run
from manyvoice.data.manifest import open_corpus
from manyvoice.decode.evaluate import evaluate, greedy_decoder
from manyvoice.errors import ModelError, UsageError, WorkError
from manyvoice.export import onnx as export
from manyvoice.export.onnx import Exported, check_parity, export_onnx, onnx_recogniser, tokens_of
from manyvoice.recipes.sizes import load_size
from manyvoice.recipes.train import train

pytest.importorskip("onnx")
pytestmark = pytest.mark.timeout(400)  # exporting takes a minute where the cores have other work


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory, speak_tones: Callable[..., Path]) -> Path:
    return speak_tones(tmp_path_factory.mktemp("export") / "tones", 16, 0)


@pytest.fixture(scope="session")
def supernet(tones: Path, tiny_settings: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supernet that has learned a little, so that its answers are not all blank."""
    run = {
        "output": str(tmp_path_factory.mktemp("supernet") / "run"), "corpus": {"train": str(tones), "dev": str(tones)},
        "tokenizer": {"kind": "words"}, "model": {"settings": tiny_settings | {"num_hidden_layers": 2}},
        "augment": {"freq_masks": 0, "time_masks": 0}, "optimizer": {"name": "adamw", "lr": 5e-3},
        "batch": {"seconds": 4}, "train": {"epochs": 60, "evaluate_every": 1000},
        "elastic": {"sizes": [1.0, 0.4], "grow": 0.0},
    }  # fmt: skip
    return train(make_run(run))


@pytest.fixture(scope="session")
def made(supernet: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_onnx(load_size(supernet, "40"), tmp_path_factory.mktemp("onnx") / "phone", int8=True)


def test_narrowed_extracted_and_onnx_are_one(supernet: Path, made: Exported) -> None:
    recogniser = load_size(supernet, "40")
    assert made.parity < 1e-4
    runtime = onnx_recogniser(made.model, recogniser)
    for lengths in ([16], [700, 33], [100, 100, 99, 17]):
        len_B = torch.tensor(lengths)
        x_BTF = torch.randn(len(lengths), max(lengths), 80)
        one, two = recogniser.logp(x_BTF, len_B), runtime.logp(x_BTF, len_B)
        assert two.len_B.tolist() == one.len_B.tolist()
        for b, n in enumerate(one.len_B.tolist()):
            torch.testing.assert_close(two.x[b, :n], one.x[b, :n], atol=1e-4, rtol=0)


def test_int8_costs_little_and_is_smaller(supernet: Path, made: Exported, tones: Path) -> None:
    recogniser = load_size(supernet, "40")
    assert made.int8 is not None and made.int8_bytes is not None and made.int8_bytes < made.bytes
    corpus = open_corpus(tones)
    plain = evaluate(recogniser, corpus)
    small = evaluate(onnx_recogniser(made.int8, recogniser), corpus)
    assert plain.words.rate < 1, "the model says nothing, so this test would hold of anything"
    assert abs(small.loss - plain.loss) < 0.2 * plain.loss + 0.05


WITHOUT_TORCH = """
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
x, n = numpy.load(sys.argv[2]), numpy.load(sys.argv[3])
logprobs, lengths = session.run(None, {"audio_signal": x, "length": n})
assert "torch" not in sys.modules and "manyvoice" not in sys.modules
print(json.dumps([row[:n].argmax(-1).tolist() for row, n in zip(logprobs, lengths)]))
"""


def test_it_runs_without_torch(supernet: Path, made: Exported, tmp_path: Path) -> None:
    recogniser = load_size(supernet, "40")
    x_BTF, len_B = torch.randn(2, 90, 80), torch.tensor([90, 50])
    np.save(tmp_path / "x.npy", x_BTF.transpose(1, 2).numpy())
    np.save(tmp_path / "n.npy", len_B.numpy())
    words = [sys.executable, "-c", WITHOUT_TORCH, made.model, tmp_path / "x.npy", tmp_path / "n.npy"]
    told = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=True).stdout
    logp = recogniser.logp(x_BTF, len_B)
    assert json.loads(told) == [logp.x[b, :n].argmax(-1).tolist() for b, n in enumerate(logp.len_B.tolist())]


def test_sherpa_onnx_gives_our_text(supernet: Path, made: Exported, tones: Path) -> None:
    sherpa = pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")
    recogniser = load_size(supernet, "40")
    other = sherpa.OfflineRecognizer.from_nemo_ctc(model=str(made.model), tokens=str(made.tokens), num_threads=1)
    ours, theirs = [], []
    for utterance in list(open_corpus(tones))[:10]:
        samples = utterance.audio.read()
        logp = recogniser.logp_of([samples])
        ours += greedy_decoder(recogniser)(logp)
        stream = other.create_stream()
        stream.accept_waveform(16_000, samples)
        other.decode_stream(stream)
        theirs.append(stream.result.text.strip())
    assert any(ours) and len(ours) == 10
    assert theirs == ours


def test_tokens_are_written_as_runtimes_read_them(supernet: Path, made: Exported) -> None:
    recogniser = load_size(supernet, None)
    lines = tokens_of(recogniser).splitlines()
    assert lines == made.tokens.read_text(encoding="utf-8").splitlines()
    assert lines[-1] == f"<blk> {len(lines) - 1}" and lines[1].startswith("▁")


def test_a_file_that_differs_is_not_written(
    supernet: Path, made: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(scores: Any, bins: int, path: Path) -> None:
        shutil.copy(made.model, path)  # another model's

    monkeypatch.setattr(export, "_export", wrong)
    with pytest.raises(WorkError, match=r"differ from torch by .* so it is not written"):
        export_onnx(load_size(supernet, "100"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["everywhere", "in one frame"])
def test_a_runtime_that_gives_no_numbers_is_found_out(
    supernet: Path, made: Exported, what: float, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recogniser, run = load_size(supernet, "40"), export._runner(made.model)

    def broken(*inputs: Any) -> tuple[np.ndarray, np.ndarray]:
        found, lengths = run(*inputs)
        found[:, 0 if where == "in one frame" else slice(None)] = what
        return found, lengths

    monkeypatch.setattr(export, "_runner", lambda path: broken)
    with pytest.raises(WorkError, match="which must be finite, so it is not written"):
        check_parity(made.model, export._Scores(recogniser), 80)


def test_exporting_again_leaves_nothing_of_before(
    supernet: Path, made: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_export", lambda scores, bins, path: shutil.copy(made.model, path))
    shutil.copytree(made.model.parent, tmp_path / "phone")
    (tmp_path / "phone" / "voices").mkdir()
    rows = [f"voices/{digit * 12}.npy" for digit in "ab"] + ["voices/../mine.txt"]
    for row in (*rows, "mine.txt", "voices/theirs.npy"):
        (tmp_path / "phone" / row).write_text("x")
    (tmp_path / "phone" / "voices.json").write_text(json.dumps({"voices": [{"file": row} for row in rows]}))
    export_onnx(load_size(supernet, "40"), tmp_path / "phone")
    left = {str(p.relative_to(tmp_path / "phone")) for p in (tmp_path / "phone").rglob("*") if p.is_file()}
    # what others put there stays
    assert left == {"model.onnx", "tokens.txt", "features.npz", "mine.txt", "voices/theirs.npy"}
    (tmp_path / "phone" / "voices" / "theirs.npy").unlink()
    export_onnx(load_size(supernet, "40"), tmp_path / "phone")
    assert not (tmp_path / "phone" / "voices").exists()


def test_damaged_files_and_wrong_words(supernet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"bad\.onnx: no ONNX model that ONNX Runtime reads"):
        onnx_recogniser(tmp_path / "bad.onnx", load_size(supernet, None))
    with pytest.raises(UsageError, match="--to coreml: must be one of onnx, folder, peft"):
        CliRunner().invoke(app, ["export", str(supernet), "--to", "coreml"], catch_exceptions=False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"needs onnxscript: pip install 'manyvoice\[export\]'"):
        export_onnx(load_size(supernet, None), tmp_path / "out")


def test_the_command_prints_what_int8_costs(
    supernet: Path, made: Exported, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ready(scores: Any, bins: int, path: Path) -> None:  # exporting again would only cost time
        shutil.copy(made.model, path)

    monkeypatch.setattr(export, "_export", ready)
    words = ["export", supernet, "--size", "40", "--int8", "--measure", tones, "-o", tmp_path / "phone", "--json"]
    found = json.loads(CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False).stdout)
    assert found["wer_torch"] == found["wer_onnx"] < 1 and abs(found["wer_int8"] - found["wer_onnx"]) <= 0.1
