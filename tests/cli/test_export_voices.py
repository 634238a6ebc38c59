"""``manyvoice export`` with voices: each form, and what is refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch

from manyvoice.decode.recogniser import Recogniser
from manyvoice.export.peft import from_peft
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.method import make_method
from manyvoice.submodels.voice import Voice

Command = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def voices(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each method."""
    base, folder = Recogniser.load(trained / "model"), tmp_path_factory.mktemp("voices")
    files = {}
    for name in ("lora", "scale", "adapter"):
        bank = Bank(base.family.anatomy(base.model), make_method(name), ["one"])
        with torch.no_grad():
            for p in bank.parameters():
                p[1] += 0.1 * torch.randn(p[1].shape, generator=torch.Generator().manual_seed(0))
        voice = Voice(
            method=bank.method, tensors=bank.take(1), base=base.fingerprint(),
            tokenizer=base.tokenizer.fingerprint(),
        )  # fmt: skip
        files[name] = voice.write(folder / f"{name}.safetensors")
    return files


def document(done: CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_voice_for_peft(trained: Path, voices: dict[str, Path], tmp_path: Path, manyvoice: Command) -> None:
    out = tmp_path / "peft"
    words = ("export", trained / "model", "--to", "peft", "--voice", voices["lora"], "-o", out, "--json")
    assert document(manyvoice(*words)) == {"peft": str(out), "voice": str(voices["lora"])}
    base = Recogniser.load(trained / "model")
    again = from_peft(out, base.model, base=base.fingerprint(), tokenizer=base.tokenizer.fingerprint())
    assert again.hash == Voice.read(voices["lora"]).hash
    refused = manyvoice(*words)
    assert refused.returncode == 2 and "is not empty; name a new folder" in refused.stderr


def test_a_merged_folder_is_a_model_with_a_card(
    trained: Path, test_tones: Path, voices: dict[str, Path], tmp_path: Path, manyvoice: Command
) -> None:
    out = tmp_path / "ann"
    words = ("--to", "folder", "--voice", voices["scale"], "--measure", test_tones, "-o", out, "--json")
    found = document(manyvoice("export", trained / "model", *words))
    card = json.loads((out / "manyvoice.json").read_text())
    assert card["voice"] == {"hash": Voice.read(voices["scale"]).hash, "method": "scale"}
    assert card["results"]["test"]["wer"] == found["wer"]
    assert card["made_from"] == Recogniser.load(trained / "model").fingerprint() != card["fingerprint"]
    checks = document(manyvoice("check", out, "--json"))["checks"]
    assert [c["claim"] for c in checks if c["holds"] is False] == []
    assert manyvoice("transcribe", out, test_tones.parent / "0.wav").returncode == 0


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--to", "tar"], 2, "--to tar: must be one of onnx, folder, peft"),
        (["--to", "folder"], 2, "--to folder takes one --voice FILE, but there are 0"),
        (["--to", "peft", "--voice", "lora", "--voice", "scale"], 2, "but there are 2"),
        (["--to", "folder", "--voice", "lora", "--int8"], 2, "--int8 belongs to --to onnx"),
        (["--to", "peft", "--voice", "lora", "--size", "40"], 2, "leave out --size and --measure"),
        (["--to", "folder", "--voice", "lora", "--size", "40"], 2, "has no sizes"),
        (["--to", "folder", "--voice", "adapter"], 1, "method adapter cannot be worked into the weights"),
        (["--to", "peft", "--voice", "adapter"], 1, "method adapter has no form in PEFT"),
        (["--voice", "lora", "--voice", "scale"], 1, "but this export takes lora"),
        (["--voice", "nothing"], 1, "nothing: cannot be read"),
    ],
)
def test_wrong_words(
    trained: Path, voices: dict[str, Path], tmp_path: Path, manyvoice: Command, words: list[str], status: int, text: str
) -> None:
    named = [voices.get(w, w) for w in words]
    done = manyvoice("export", trained / "model", *named, "-o", tmp_path / "out")
    assert (done.returncode, "Traceback" in done.stderr, done.stdout) == (status, False, ""), done.stderr
    assert text in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_no_folder_is_made_of_a_file(
    trained: Path, voices: dict[str, Path], tmp_path: Path, manyvoice: Command
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for form in ("folder", "peft"):
        words = ("--to", form, "--voice", voices["lora"], "-o", tmp_path / "notes.txt")
        done = manyvoice("export", trained / "model", *words)
        assert done.returncode == 2 and "notes.txt is a file; name a new folder" in " ".join(done.stderr.split())


def test_a_model_or_a_file_is_not_exported_over(trained: Path, tmp_path: Path, manyvoice: Command) -> None:
    pytest.importorskip("onnx")
    before = sorted(p.name for p in (trained / "model").iterdir())
    (tmp_path / "notes.txt").write_text("hello")
    for place, what in ((trained / "model", "holds a model"), (tmp_path / "notes.txt", "is a file")):
        done = manyvoice("export", trained / "model", "-o", place)
        assert done.returncode == 2 and f"{what}; name another folder to export to" in " ".join(done.stderr.split())
    assert before == sorted(p.name for p in (trained / "model").iterdir())
    assert (tmp_path / "notes.txt").read_text() == "hello"


@pytest.mark.slow
def test_onnx_with_voices_and_what_they_cost(
    trained: Path, test_tones: Path, voices: dict[str, Path], tmp_path: Path, manyvoice: Command
) -> None:
    pytest.importorskip("onnx")
    words = ("--voice", voices["adapter"], "--int8", "--measure", test_tones, "-o", tmp_path / "phone", "--json")
    found = document(manyvoice("export", trained / "model", *words))
    hash12 = Voice.read(voices["adapter"]).hash[:12]
    assert found["voices"] == {str(voices["adapter"]): str(tmp_path / "phone" / "voices" / f"{hash12}.npy")}
    assert np.load(found["voices"][str(voices["adapter"])]).dtype == np.float32
    assert found["wer_torch"] == found["wer_onnx"]
    assert {"wer_int8", f"wer_onnx_{hash12}", f"wer_int8_{hash12}"} <= found.keys()
