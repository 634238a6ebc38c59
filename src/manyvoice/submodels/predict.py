"""From a few seconds of speech without text to a voice's own numbers, by a linear map of what the frozen base hears.

Hidden states at a few taps are pooled over time to mean and standard deviation (as x-vectors pool theirs, Snyder et
al., ICASSP 2018). Onto the numbers that training speakers have learned goes a ridge regression in closed form:

    y = y0 + (P' (x - x0) / s) W        W = argmin |Y - y0 - Z W|^2 + ridge |W|^2,    Z = P' ((X - x0) / s)

P are the principal directions of the speakers' mean inputs, s the standard deviations of the inputs.

    B  utterances   T  encoder frames   D  model width
    S  speakers   M  examples of them   N  pooled inputs   Q  principal components   E  numbers of a voice
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from manyvoice.errors import VoiceError
from manyvoice.models.anatomy import anatomy_of, family_of
from manyvoice.types import Seconds, mask_of

Floats = NDArray[np.float64]

# Depths at which the base is listened to, of all its layers; speakers differ most at the bottom, what is said at the
# top. Our choice.
DEPTHS = (0.0, 1 / 3, 2 / 3, 1.0)
# Speech that an example is pooled over, and how many examples each speaker gives. Our choice.
SHORTEST, LONGEST, EXAMPLES = Seconds(2.0), Seconds(15.0), 8
# Ridges to choose from, relative to the mean square of the components; the last predicts next to nothing but y0.
RIDGES = tuple(10.0**k for k in range(-4, 5))
# Below this an input does not vary and only adds noise.
_STILL = 1e-8


@final
@dataclass(frozen=True)
class Heard:
    """What the base heard in one stretch of speech, to be pooled with others.

    Args: frames: how many.  sums, squares: over them, of every tap's every unit, float64.
    """

    frames: int
    sums: Floats
    squares: Floats

    @staticmethod
    def pooled(parts: Sequence[Heard]) -> Floats:
        """Mean and standard deviation over all frames of all parts, N = 2 x taps x D."""
        frames = sum(part.frames for part in parts)
        mean: Floats = np.sum([part.sums for part in parts], axis=0) / frames
        square: Floats = np.sum([part.squares for part in parts], axis=0) / frames
        return np.concatenate([mean, np.sqrt(np.maximum(square - mean * mean, 0.0))])


def taps_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Paths of the modules that a new predictor listens to: at :data:`DEPTHS` of the layers."""
    inside = [tap.name for tap in anatomy_of(model).taps if tap.layer >= 0]
    return tuple(inside[k] for k in sorted({round(depth * (len(inside) - 1)) for depth in DEPTHS}))


@torch.no_grad()
def listen(
    model: PreTrainedModel, features: Sequence[Tensor], taps: Sequence[str], *, frames: int = 12_000
) -> list[Heard]:
    """What the bare model hears in each utterance.

    Args: features: T F of each.  taps: paths of the modules to listen to.  frames: padded feature frames of a batch,
        at most; 12,000 are two minutes.
    """
    heard: dict[int, Heard] = {}
    order = sorted(range(len(features)), key=lambda k: -len(features[k]))
    while order:
        count = max(1, frames // len(features[order[0]]))
        some, order = order[:count], order[count:]
        heard |= dict(zip(some, _listen(model, [features[k] for k in some], taps), strict=True))
    return [heard[k] for k in range(len(features))]


def _listen(model: PreTrainedModel, features: Sequence[Tensor], taps: Sequence[str]) -> Iterator[Heard]:
    was_training = model.training
    model.eval()
    len_B = torch.tensor([len(x) for x in features], device=model.device)
    x_BTF = pad_sequence(list(features), batch_first=True).to(model.device, model.dtype)
    with _tapped(model, taps) as states:
        encoded = family_of(model).encode(model, x_BTF, len_B)
    model.train(was_training)
    inside_BT1 = mask_of(encoded.len_B, encoded.x.shape[1])[:, :, None]
    # selected before it is squared: what stands in the padding is anything
    all_BTD = torch.cat(states, dim=2).double().masked_fill(~inside_BT1, 0.0)
    sums_BD, squares_BD = all_BTD.sum(1).cpu().numpy(), all_BTD.square().sum(1).cpu().numpy()
    for b, length in enumerate(encoded.len_B.tolist()):
        yield Heard(int(length), sums_BD[b], squares_BD[b])


@contextmanager
def _tapped(model: PreTrainedModel, taps: Iterable[str]) -> Iterator[list[Tensor]]:
    """Inside, the list holds what these modules put out last, B T D each, in order."""
    states: list[Tensor] = []
    with ExitStack() as hooks:
        for tap in taps:
            module = model.get_submodule(tap)
            handle = module.register_forward_hook(lambda _, __, out: states.append(out))
            hooks.callback(handle.remove)
        yield states


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """The linear map, and what it is worth.

    Args:
        taps: paths of the modules that are listened to.
        centre, weights, mean: x0 N, P W / s N E, and y0 E.
        r2: share of the variance of the speakers' numbers that it predicts for a speaker whom the regression has not
            seen, each left out in turn.  What voices share has learned from them all, and the ridge is the best of
            several by these errors, so it is a little flattered.  0 is as good as always guessing the mean.
        speakers, components, ridge: that it was fitted on, and with.
    """

    taps: tuple[str, ...]
    centre: Floats
    weights: Floats
    mean: Floats
    r2: float
    speakers: int
    components: int
    ridge: float

    def __call__(self, parts: Sequence[Heard]) -> Floats:
        """A voice's own numbers, E. VoiceError if nothing was heard."""
        if not sum(part.frames for part in parts):
            raise VoiceError("there is no speech to predict a voice from; give at least two seconds")
        found: Floats = (Heard.pooled(parts) - self.centre) @ self.weights + self.mean
        return found

    def card(self) -> dict[str, Any]:
        """All but the numbers, as JSON."""
        return {"taps": list(self.taps), "r2": self.r2, "speakers": self.speakers, "components": self.components,
                "ridge": self.ridge}  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """The numbers."""
        named = {"centre": self.centre, "weights": self.weights, "mean": self.mean}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in named.items()}

    @classmethod
    def stored(cls, card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Predictor:
        """From both. VoiceError if they do not belong together."""
        try:
            centre, weights, mean = (tensors[name].double().numpy() for name in ("centre", "weights", "mean"))
            found = cls(
                taps=tuple(card["taps"]), r2=float(card["r2"]), speakers=int(card["speakers"]),
                components=int(card["components"]), ridge=float(card["ridge"]),
                centre=centre, weights=weights, mean=mean,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise VoiceError(f"this space's predictor cannot be read ({error!r}); train the space again") from error
        if weights.shape != (*centre.shape, *mean.shape):
            raise VoiceError(f"this space's predictor has shapes that do not fit, {json.dumps(weights.shape)}")
        return found


def examples(heard: Sequence[Heard], seconds: Sequence[float], *, key: str, count: int = EXAMPLES) -> list[list[Heard]]:
    """Random stretches of one speaker's speech, each of 2 to 15 s of whole utterances.

    Args: seconds: of each utterance.  key: what the draw follows from, such as seed and speaker.
    """
    digest = blake2b(key.encode(), digest_size=8, person=b"examples.v1").digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    found = []
    for _ in range(count):
        wanted = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST)))
        order = rng.permutation(len(heard))
        lengths = np.cumsum([seconds[k] for k in order])
        enough = int(np.searchsorted(lengths, wanted)) + 1
        found.append([heard[k] for k in order[:enough]])
    return found


def fit_predictor(x_SMN: Floats, y_SE: Floats, taps: Sequence[str]) -> Predictor:
    """The ridge regression, its ridge chosen by the error on speakers that are left out one at a time.

    Args: x_SMN: pooled inputs, M examples of every speaker.  y_SE: what the speakers have learned.
    Raises: VoiceError for fewer than 4 speakers.
    """
    S = len(x_SMN)
    if S < 4:
        raise VoiceError(f"{S} speakers cannot show how voices follow from speech; give 4 at least, better 50")
    errors = {ridge: 0.0 for ridge in RIDGES}
    of_mean = 0.0
    for out in range(S):
        kept = np.arange(S) != out
        reduced = _reduce(x_SMN[kept])
        of_mean += float(np.square(y_SE[kept].mean(0) - y_SE[out]).sum())
        for ridge in RIDGES:
            weights = _ridge(reduced, y_SE[kept], ridge)
            guess_ME = (x_SMN[out] - reduced.centre) @ weights + y_SE[kept].mean(0)
            errors[ridge] += float(np.square(guess_ME - y_SE[out]).sum(1).mean())
    best = min(RIDGES, key=lambda ridge: (errors[ridge], -ridge))
    reduced = _reduce(x_SMN)
    return Predictor(
        taps=tuple(taps), centre=reduced.centre, weights=_ridge(reduced, y_SE, best), mean=y_SE.mean(0),
        r2=1 - errors[best] / max(of_mean, 1e-300), speakers=S, components=reduced.z_MQ.shape[1], ridge=best,
    )  # fmt: skip


@dataclass(frozen=True)
class _Reduced:
    """x0 N, P / s N Q, and the components of all examples, M Q, by speaker."""

    centre: Floats
    basis: Floats
    z_MQ: Floats
    each: int


def _reduce(x_SMN: Floats) -> _Reduced:
    S, each, N = x_SMN.shape
    x_MN = x_SMN.reshape(S * each, N)
    centre, spread = x_MN.mean(0), x_MN.std(0)
    scale = np.where(spread > _STILL, spread, np.inf)
    means_SN = (x_SMN.mean(1) - centre) / scale
    _, values, directions = np.linalg.svd(means_SN, full_matrices=False)
    count = max(1, min(S // 2, int((values > 1e-9 * values[0]).sum())))
    basis = directions[:count].T / scale[:, None]
    return _Reduced(centre, basis, (x_MN - centre) @ basis, each)


def _ridge(reduced: _Reduced, y_SE: Floats, ridge: float) -> Floats:
    z_MQ, y_ME = reduced.z_MQ, np.repeat(y_SE - y_SE.mean(0), reduced.each, axis=0)
    square = z_MQ.T @ z_MQ
    more = ridge * max(float(np.trace(square)) / len(square), 1e-300) * np.eye(len(square))
    found: Floats = reduced.basis @ np.linalg.solve(square + more, z_MQ.T @ y_ME)
    return found
