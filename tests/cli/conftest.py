"""A corpus of tones that spell words, and one run trained on it, for everything at the command line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import soundfile

from manyvoice.cli import main

WORDS = {"low": 300.0, "mid": 900.0, "high": 2400.0}
RATE = 16_000
SETTINGS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "subsampling_conv_channels": 8,
}

Command = Callable[..., subprocess.CompletedProcess[str]]


def speak_tones(folder: Path, count: int, seed: int) -> Path:
    """A manifest of ``count`` utterances of one to three tones by two speakers."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        words = rng.choice(list(WORDS), size=int(rng.integers(1, 4)))
        t = np.arange(int(0.3 * RATE)) / RATE
        pieces = [np.sin(2 * np.pi * WORDS[str(w)] * t) * np.hanning(len(t)) for w in words]
        samples = 0.3 * np.concatenate([np.concatenate([p, np.zeros(800)]) for p in pieces])
        samples += rng.normal(0, 0.003, len(samples))
        soundfile.write(folder / f"{i}.wav", samples, RATE, subtype="PCM_16")
        rows.append(
            {
                "audio_filepath": f"{i}.wav",
                "duration": round(len(samples) / RATE, 4),
                "text": " ".join(map(str, words)),
                "speaker": f"s{i % 2}",
                "age": 10 + 20 * (i % 2),
            }
        )
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_command(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``manyvoice WORDS`` in this process, which saves seconds of imports; what it prints and its exit status."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        chdir(cwd or Path.cwd()),
        patch.object(sys, "argv", ["manyvoice", *map(str, words)]),
        patch.dict(os.environ, COLUMNS="200"),
    ):
        try:
            main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def manyvoice() -> Command:
    return run_command


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speak_tones(tmp_path_factory.mktemp("tones") / "train", 24, 0)


@pytest.fixture(scope="session")
def test_tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speak_tones(tmp_path_factory.mktemp("tones") / "test", 6, 1)


@pytest.fixture(scope="session")
def trained(tones: Path, test_tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that the command line trained."""
    folder = tmp_path_factory.mktemp("run")
    run = {
        "output": str(folder / "run"),
        "corpus": {"train": str(tones), "test": str(test_tones), "licence": "CC0-1.0"},
        "tokenizer": {"kind": "words"},
        "model": {"settings": SETTINGS},
        "batch": {"seconds": 5, "bins": 2},
        "train": {"epochs": 2},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(run), encoding="utf-8")  # JSON is YAML
    done = run_command("train", path)
    assert done.returncode == 0, done.stderr
    return folder / "run"
