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

import pytest

from manyvoice.cli import main

Command = Callable[..., subprocess.CompletedProcess[str]]


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
def tones(tmp_path_factory: pytest.TempPathFactory, speak_tones: Callable[[Path, int, int], Path]) -> Path:
    return speak_tones(tmp_path_factory.mktemp("tones") / "train", 24, 0)


@pytest.fixture(scope="session")
def test_tones(tmp_path_factory: pytest.TempPathFactory, speak_tones: Callable[[Path, int, int], Path]) -> Path:
    return speak_tones(tmp_path_factory.mktemp("tones") / "test", 6, 1)


@pytest.fixture(scope="session")
def trained(
    tones: Path, test_tones: Path, tiny_settings: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run that the command line trained."""
    folder = tmp_path_factory.mktemp("run")
    run = {
        "output": str(folder / "run"),
        "corpus": {"train": str(tones), "test": str(test_tones), "licence": "CC0-1.0"},
        "tokenizer": {"kind": "words"},
        "model": {"settings": tiny_settings},
        "batch": {"seconds": 5, "bins": 2},
        "train": {"epochs": 2},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(run), encoding="utf-8")  # JSON is YAML
    done = run_command("train", path)
    assert done.returncode == 0, done.stderr
    return folder / "run"
