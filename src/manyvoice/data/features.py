"""Log-mel features by the model's own feature extractor, one utterance at a time.

Each utterance is extracted alone, so its features do not depend on its batch mates to the last bit.

    N  samples   T  feature frames   F  mel bins
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor
from transformers import ParakeetFeatureExtractor
from transformers.models.parakeet.feature_extraction_parakeet import EPSILON, LOG_ZERO_GUARD_VALUE

from manyvoice.errors import AudioError, ModelError
from manyvoice.types import Frames, Seconds

# The normalisation divides by the standard deviation over time with n - 1 in it.
SHORTEST_FRAMES = 2


@final
class LogMel:
    """Samples N to log-mel T F with the settings that stand in the model folder."""

    def __init__(self, stock: ParakeetFeatureExtractor) -> None:
        self.stock = stock
        self.rate: int = int(stock.sampling_rate)
        self.hop: int = int(stock.hop_length)
        self.bins: int = int(stock.feature_size)

    def __call__(self, samples_N: np.ndarray) -> Tensor:
        """T F in float32, each bin normalised over the utterance. AudioError if it is shorter than two frames."""
        if self.frames_of(len(samples_N)) < SHORTEST_FRAMES:
            shortest = SHORTEST_FRAMES * self.hop / self.rate
            raise AudioError(f"{len(samples_N)} samples are too short to recognise; at least {shortest} s are needed")
        out = self.stock(np.ascontiguousarray(samples_N), sampling_rate=self.rate, return_tensors="pt")
        features_TF: Tensor = out["input_features"][0]
        return features_TF[: int(out["attention_mask"][0].sum())]

    def frames_of(self, samples: int) -> Frames:
        """Feature frames of so many samples."""
        return Frames(samples // self.hop)

    def frames(self, duration: Seconds) -> Frames:
        """Feature frames of so many seconds."""
        return self.frames_of(round(duration * self.rate))

    def settings(self) -> str:
        """What the features depend on, as one line; part of a cache's key."""
        names = ("feature_size", "sampling_rate", "hop_length", "n_fft", "win_length", "preemphasis", "padding_value")
        return " ".join(f"{n}={getattr(self.stock, n)}" for n in names)

    def save(self, folder: Path) -> None:
        """Write ``preprocessor_config.json``."""
        self.stock.save_pretrained(str(folder))

    def arrays(self) -> dict[str, np.ndarray]:
        """What a program without torch needs for the same features, in double precision; W samples in a window.

        With p = samples less ``preemphasis`` times the sample before, padded by W / 2 zeros on both sides, and a window
        every ``hop`` samples: log(|rfft(p * window_W)|^2 @ mel_KF + floor) with K = W / 2 + 1 frequencies. Each bin
        less its mean is divided by its standard deviation over time, with T - 1 in it, plus ``epsilon``.
        """
        stock = self.stock
        window_W = np.zeros(stock.n_fft)
        start = (stock.n_fft - stock.win_length) // 2  # torch.stft centres a short window
        window_W[start : start + stock.win_length] = np.hanning(stock.win_length)
        numbers = {
            "hop": self.hop,
            "rate": self.rate,
            "preemphasis": stock.preemphasis or 0.0,
            "floor": LOG_ZERO_GUARD_VALUE,
            "epsilon": EPSILON,
        }
        mel_KF = stock.mel_filters.double().numpy().T
        return {"window": window_W, "mel": mel_KF, **{name: np.asarray(n) for name, n in numbers.items()}}

    @classmethod
    def build(cls, settings: Mapping[str, object]) -> LogMel:
        """From settings that a model family gives."""
        return cls(ParakeetFeatureExtractor(**settings))

    @classmethod
    def load(cls, folder: Path) -> LogMel:
        """From a model folder. ModelError if it has no feature extractor."""
        try:
            return cls(ParakeetFeatureExtractor.from_pretrained(str(folder), local_files_only=True))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{folder} holds no feature extractor that Transformers reads ({error})") from error


def half(features_TF: Tensor) -> np.ndarray:
    """Features as they are cached: normalised values need no more than float16."""
    array: np.ndarray = features_TF.to(torch.float16).numpy()
    return array
