"""A stricter world than users have: deterministic, seeded, offline, one thread. Warnings are errors: pyproject.toml."""

from __future__ import annotations

import os

# Set before torch and transformers are imported anywhere: both read them at import or first use.
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub is wrong
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch processes with more threads than cores stall each other
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import settings

# The clock decides nothing, and the same commit tries the same examples on every machine.
settings.register_profile("manyvoice", deadline=None, derandomize=True)
settings.load_profile("manyvoice")


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Deterministic algorithms, seed 0 and one thread; the caller's random state and settings come back."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real speech; tests that need it skip where there is none."""
    named = os.environ.get("MANYVOICE_DATA")
    if not named:
        pytest.skip("needs real speech: set MANYVOICE_DATA to a folder of it")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"MANYVOICE_DATA is {named!r}, which is not a folder; name one, or unset it to skip these tests")
    return folder


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The accelerator; tests that need one skip where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is false")
    return torch.device("cuda")


@pytest.fixture
def wav(tmp_path: Path) -> Callable[..., Path]:
    """Writes a sine wave below ``tmp_path``: ``wav("a.wav", seconds=0.3, rate=8000, channels=2, hz=220.0)``."""

    def write(
        name: str = "tone.wav", *, seconds: float = 0.5, rate: int = 16_000, channels: int = 1, hz: float = 440.0
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        time_N = np.arange(round(seconds * rate)) / rate
        tone_N = 0.3 * np.sin(2 * np.pi * hz * time_N)
        soundfile.write(path, np.repeat(tone_N[:, None], channels, axis=1), rate)
        return path

    return write
