"""A stricter world than users have: deterministic, seeded, offline, one thread. Warnings are errors: pyproject.toml."""

from __future__ import annotations

import os

# Set before torch and transformers are imported anywhere: both read them at import or first use.
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub is wrong
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch processes with more threads than cores stall each other
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import settings

from manyvoice.types import Batch, mask_of

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


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered between runs, such as batch sizes, is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYVOICE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, int]:
    """Settings of a Parakeet that trains in a second."""
    return {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "subsampling_conv_channels": 8,
    }


@pytest.fixture(scope="session")
def frozen_base() -> Callable[[int, int], Any]:
    """(layers, seed) to a frozen model of a few thousand random weights, in double precision."""
    from manyvoice.models.load import build_model

    def build(layers: int, seed: int) -> Any:
        torch.manual_seed(seed)
        settings = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 32}
        model, _ = build_model("tiny", settings | {"subsampling_conv_channels": 8}, vocabulary=9, blank=8)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
            p.requires_grad_(False)
        return model.double().eval()

    return build


@pytest.fixture(scope="session")
def ragged() -> Callable[[Sequence[int], Sequence[Sequence[int]]], Batch]:
    """Noise in double precision, zero after each length: ``ragged([50, 37], [[1, 2, 3], [4]])``."""

    def make(frames: Sequence[int], labels: Sequence[Sequence[int]]) -> Batch:
        len_B, token_len_B = torch.tensor(frames), torch.tensor([len(row) for row in labels])
        T, U = max(frames), max(map(len, labels))
        x_BTF = torch.randn(len(frames), T, 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        zeros = torch.zeros(len(frames), dtype=torch.int64)
        return Batch(
            ids=tuple("abcdefgh"[: len(frames)]), features_BTF=x_BTF * mask_of(len_B, T)[:, :, None], len_B=len_B,
            tokens_BU=torch.tensor([[*row, *[0] * (U - len(row))] for row in labels]), token_len_B=token_len_B,
            owner_B=zeros, label_B=zeros, seconds_B=len_B.double() / 100,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def speak_tones() -> Callable[[Path, int, int], Path]:
    """Writes a manifest of tones that spell words: ``speak_tones(new_folder, utterances, seed)``."""
    return _speak_tones


_TONES = {"low": 300.0, "mid": 900.0, "high": 2400.0}


def _speak_tones(folder: Path, count: int, seed: int) -> Path:
    """A manifest of ``count`` utterances of one to three tones by two speakers."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        words = rng.choice(list(_TONES), size=int(rng.integers(1, 4)))
        t = np.arange(int(0.3 * 16_000)) / 16_000
        pieces = [np.sin(2 * np.pi * _TONES[str(w)] * t) * np.hanning(len(t)) for w in words]
        samples = 0.3 * np.concatenate([np.concatenate([p, np.zeros(800)]) for p in pieces])
        samples += rng.normal(0, 0.003, len(samples))
        soundfile.write(folder / f"{i}.wav", samples, 16_000, subtype="PCM_16")
        rows.append(
            {
                "audio_filepath": f"{i}.wav",
                "duration": round(len(samples) / 16_000, 4),
                "text": " ".join(map(str, words)),
                "speaker": f"s{i % 2}",
                "age": 10 + 20 * (i % 2),
            }
        )
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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
