"""Features: what a program without torch computes from the saved arrays is what the model is fed."""

from __future__ import annotations

import numpy as np
import pytest

from manyvoice.data.features import LogMel


@pytest.mark.parametrize("samples", [320, 16_000, 40_123])
def test_arrays_give_the_same_features_without_torch(samples: int) -> None:
    log_mel = LogMel.build({"feature_size": 80})
    x_N = np.random.default_rng(0).standard_normal(samples).astype(np.float32) * np.linspace(0.01, 1, samples)
    f = log_mel.arrays()
    p_N = np.append(x_N[:1], x_N[1:] - f["preemphasis"] * x_N[:-1])
    W = len(f["window"])
    cut_TW = np.lib.stride_tricks.sliding_window_view(np.pad(p_N, W // 2), W)[:: f["hop"]][: samples // f["hop"]]
    mel_TF = np.log(np.abs(np.fft.rfft(cut_TW * f["window"])) ** 2 @ f["mel"] + f["floor"])
    mel_TF = (mel_TF - mel_TF.mean(0)) / (mel_TF.std(0, ddof=1) + f["epsilon"])
    found_TF = log_mel(x_N.astype(np.float32)).numpy()
    assert np.abs(mel_TF - found_TF).max() < 2e-4
