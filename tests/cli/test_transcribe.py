"""``manyvoice transcribe -o``: an output holds the words of one set of weights, and says whose."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from manyvoice.decode.recogniser import Recogniser
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.method import make_method
from manyvoice.submodels.store import Store
from manyvoice.submodels.voice import Voice

Command = Callable[..., subprocess.CompletedProcess[str]]


def voice_of(recogniser: Recogniser, seed: int) -> Voice:
    bank = Bank(recogniser.family.anatomy(recogniser.model), make_method("adapter", {"rank": 2}), ["one"])
    gen = torch.Generator().manual_seed(seed)
    tensors = {where: t + 0.3 * torch.randn(t.shape, generator=gen) for where, t in bank.take(1).items()}
    return Voice(
        method=bank.method, tensors=tensors, base=recogniser.fingerprint(),
        tokenizer=recogniser.tokenizer.fingerprint(),
    )  # fmt: skip


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    recogniser = Recogniser.load(trained / "model")
    Store(tmp_path / "store").add_many([(name, voice_of(recogniser, k)) for k, name in enumerate(("ann", "bob"))])
    return tmp_path / "store"


@pytest.mark.parametrize(("name", "form"), [("o.jsonl", "text"), ("o", "srt"), ("o", "vtt"), ("o", "text")])
def test_another_voice_writes_into_another_output(
    trained: Path, test_tones: Path, store: Path, tmp_path: Path, manyvoice: Command, name: str, form: str
) -> None:
    out = tmp_path / name
    words = ("transcribe", trained / "model", test_tones.parent / "0.wav", "--format", form, "-o", out)
    ann, bob = ("--voice", "ann", "--voices", store), ("--voice", "bob", "--voices", store)
    assert manyvoice(*words, *ann).returncode == 0
    before = {p: p.read_bytes() for p in [out, *out.rglob("*")] if p.is_file()}
    noted = json.loads((out if out.is_file() else out / "receipt.json").read_text())
    assert noted.get("receipt", noted)["hash"] == Store(store).resolve("ann")
    for other in (bob, ()):
        done = manyvoice(*words, *other)
        assert (done.returncode, done.stdout) == (2, "") and "was made with base " in done.stderr
        assert "the voice ann (" in done.stderr and "name another --output, or delete this one" in done.stderr
    assert "0 recordings transcribed" in manyvoice(*words, *ann).stderr
    Store(store).add(Store(store).get("bob"), "ann")
    assert manyvoice(*words, *ann).returncode == 2
    assert before == {p: p.read_bytes() for p in before}


def test_without_a_voice_too_the_output_says_whose_words_it_holds(
    trained: Path, test_tones: Path, store: Path, tmp_path: Path, manyvoice: Command
) -> None:
    out, sound = tmp_path / "o.jsonl", test_tones.parent / "0.wav"
    assert manyvoice("transcribe", trained / "model", sound, "-o", out).returncode == 0
    receipt = json.loads(out.read_text())["receipt"]
    assert receipt["base"] == Recogniser.load(trained / "model").fingerprint()
    assert receipt["hash"] is receipt["size"] is None
    shown = manyvoice("transcribe", trained / "model", sound, "--format", "jsonl").stdout
    assert shown == out.read_text()
    done = manyvoice("transcribe", trained / "model", sound, "-o", out, "--voice", "ann", "--voices", store)
    assert done.returncode == 2 and "no voice; asked for now is" in done.stderr
