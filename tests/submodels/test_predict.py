"""What predicts voices: a planted map is found, an absent one is not, and what is heard does not depend on batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from manyvoice.errors import VoiceError
from manyvoice.models.anatomy import family_of
from manyvoice.submodels.predict import (
    EXAMPLES,
    LONGEST,
    RIDGES,
    Heard,
    Predictor,
    examples,
    fit_predictor,
    listen,
    taps_of,
)

Floats = NDArray[np.float64]


def planted(speakers: int, inputs: int, *, noise: float = 0.1, seed: int = 0) -> tuple[Floats, Floats]:
    """Speakers in three hidden dimensions, which inputs and voices follow from, each by a map of its own."""
    rng = np.random.default_rng(seed)
    hidden_SH = rng.normal(size=(speakers, 3))
    x_SMN = (hidden_SH @ rng.normal(size=(3, inputs)))[:, None] + noise * rng.normal(size=(speakers, EXAMPLES, inputs))
    return 50 + 3 * x_SMN, 1 + hidden_SH @ rng.normal(size=(3, 6))


def test_a_planted_map_is_found() -> None:
    x_SMN, y_SE = planted(40, 30)
    found = fit_predictor(x_SMN[:30], y_SE[:30], ["a"])
    assert found.r2 > 0.95 and found.speakers == 30 and found.components <= 15
    for x_MN, y_E in zip(x_SMN[30:], y_SE[30:], strict=True):
        for x_N in x_MN:
            # a mean of the first half and a standard deviation of the second, which is never below zero
            heard = Heard(1, x_N[:15], np.square(x_N[:15]) + np.square(x_N[15:]))
            guess = found([heard])
            assert np.square(guess - y_E).sum() < 0.05 * np.square(y_SE - y_SE.mean(0)).sum(1).mean()


@pytest.mark.parametrize("inputs", [10, 200])
def test_what_does_not_follow_from_speech_is_not_predicted(inputs: int) -> None:
    """Also with more inputs than speakers, where the fit itself is perfect."""
    worth = []
    for seed in range(6):
        x_SMN, y_SE = planted(24, inputs, seed=seed)
        assert fit_predictor(x_SMN, y_SE, ["a"]).r2 > 0.9
        worth.append(fit_predictor(x_SMN, np.random.default_rng(seed).permutation(y_SE), ["a"]).r2)
    assert max(worth) < 0.1 and np.mean(worth) < 0.05


def test_the_error_of_speakers_left_out_is_that_of_fits_without_them() -> None:
    """Ridge, directions and standardisation included: nothing of a speaker is in what predicts it."""
    x_SMN, y_SE = planted(10, 40, noise=0.5)
    found = fit_predictor(x_SMN, y_SE, ["a"])
    error = of_mean = 0.0
    for out in range(10):
        kept = [s for s in range(10) if s != out]
        x_MN, y_ME = x_SMN[kept].reshape(-1, 40), np.repeat(y_SE[kept], EXAMPLES, axis=0)
        scaled = (x_MN - x_MN.mean(0)) / x_MN.std(0)
        _, _, directions = np.linalg.svd(scaled.reshape(9, EXAMPLES, 40).mean(1))
        z_MQ = scaled @ directions[:4].T
        more = found.ridge * np.square(z_MQ).sum() / 4
        weights = np.linalg.inv(z_MQ.T @ z_MQ + more * np.eye(4)) @ z_MQ.T @ (y_ME - y_SE[kept].mean(0))
        guess = (x_SMN[out] - x_MN.mean(0)) / x_MN.std(0) @ directions[:4].T @ weights + y_SE[kept].mean(0)
        error += np.square(guess - y_SE[out]).sum(1).mean()
        of_mean += np.square(y_SE[kept].mean(0) - y_SE[out]).sum()
    assert found.r2 == pytest.approx(1 - error / of_mean, rel=1e-9)
    assert found.ridge in RIDGES


def test_inputs_that_do_not_vary_do_no_harm() -> None:
    x_SMN, y_SE = planted(20, 30)
    still = np.concatenate([x_SMN, np.full((20, EXAMPLES, 5), 7.0)], axis=2)
    found = fit_predictor(still, y_SE, ["a"])
    assert not found.weights[-5:].any()
    assert found.r2 == pytest.approx(fit_predictor(x_SMN, y_SE, ["a"]).r2, rel=1e-9)


def test_pooling_is_over_all_frames() -> None:
    rng = np.random.default_rng(0)
    frames = [rng.normal(size=(n, 4)) for n in (3, 9, 1)]
    parts = [Heard(len(x), x.sum(0), np.square(x).sum(0)) for x in frames]
    whole = np.concatenate(frames)
    np.testing.assert_allclose(Heard.pooled(parts), np.concatenate([whole.mean(0), whole.std(0)]), rtol=1e-12)


def test_what_is_heard_does_not_depend_on_the_batch(base: PreTrainedModel) -> None:
    gen = torch.Generator().manual_seed(2)
    features = [torch.randn(n, 80, generator=gen, dtype=torch.float64) for n in (41, 90, 64)]
    hooks = [len(m._forward_hooks) for m in base.modules()]
    together, apart = listen(base, features, taps_of(base)), listen(base, features, taps_of(base), frames=1)
    for a, b, x in zip(together, apart, features, strict=True):
        assert a.frames == b.frames == family_of(base).encoder_frames(base, len(x))
        np.testing.assert_allclose(a.sums, b.sums, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(a.squares, b.squares, rtol=1e-9, atol=1e-11)
    assert [len(m._forward_hooks) for m in base.modules()] == hooks, "nothing stays hooked"


def test_what_is_heard_are_the_hidden_states_of_the_taps(base: PreTrainedModel) -> None:
    taps = taps_of(base)
    assert taps == tuple(f"encoder.layers.{k}" for k in range(3))
    x_TF = torch.randn(50, 80, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    states = []
    for tap in taps:
        handle = base.get_submodule(tap).register_forward_hook(lambda _, __, out: states.append(out[0]))
        with torch.no_grad():
            encoded = family_of(base).encode(base, x_TF[None], torch.tensor([50]))
        handle.remove()
    whole = torch.cat(states, 1)[: int(encoded.len_B[0])]
    (heard,) = listen(base, [x_TF], taps)
    np.testing.assert_allclose(heard.sums, whole.sum(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(heard.squares, whole.square().sum(0).numpy(), rtol=1e-12)
    (first,) = listen(base, [x_TF], taps[:1])
    np.testing.assert_array_equal(first.sums, heard.sums[: len(first.sums)])
    assert len(first.sums) * 3 == len(heard.sums)


def test_examples_are_a_few_seconds_of_whole_utterances() -> None:
    heard = [Heard(k + 1, np.zeros(1), np.zeros(1)) for k in range(12)]
    seconds = [1.0 + 0.2 * k for k in range(12)]
    drawn = examples(heard, seconds, key="0 ann")
    assert len(drawn) == EXAMPLES and drawn == examples(heard, seconds, key="0 ann")
    assert drawn != examples(heard, seconds, key="0 bob")
    for parts in drawn:
        frames = [part.frames for part in parts]
        assert len(set(frames)) == len(frames)
        assert 2.0 <= sum(seconds[f - 1] for f in frames) <= LONGEST + max(seconds)
    assert len({len(parts) for parts in drawn}) > 1


def test_a_stored_predictor_is_the_predictor() -> None:
    x_SMN, y_SE = planted(12, 8)
    found = fit_predictor(x_SMN, y_SE, ["a", "b"])
    again = Predictor.stored(found.card(), found.tensors())
    part = Heard(2, np.arange(4.0), np.arange(4.0) ** 2)
    assert np.array_equal(found([part]), again([part])) and again.taps == ("a", "b") and again.r2 == found.r2
    with pytest.raises(VoiceError, match="predictor cannot be read"):
        Predictor.stored({"taps": []}, found.tensors())
    with pytest.raises(VoiceError, match="shapes that do not fit"):
        Predictor.stored(found.card(), found.tensors() | {"mean": torch.zeros(5)})


def test_too_little_is_refused() -> None:
    x_SMN, y_SE = planted(3, 8)
    with pytest.raises(VoiceError, match="3 speakers cannot show"):
        fit_predictor(x_SMN, y_SE, ["a"])
    found = fit_predictor(*planted(6, 8), ["a"])
    with pytest.raises(VoiceError, match="no speech to predict"):
        found([])
