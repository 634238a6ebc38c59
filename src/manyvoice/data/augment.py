"""Changes to training audio and features that leave the words alone.

Every random number comes from ``(seed, epoch, utterance)``: never from a rank's or a worker's stream. So an utterance
is changed in the same way whatever batch it is in, on however many workers and ranks, and after a resume.

    B utterances, T frames, F features, M masks, N samples
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import final

import numpy as np
import soxr
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from manyvoice.errors import ConfigError, Mistake
from manyvoice.types import Seconds, mask_of

Audio = NDArray[np.float32]
COLOURS = ("white", "pink")


@final
@dataclass(frozen=True, kw_only=True)
class Augment:
    """What may be done to a training utterance; the defaults do nothing.

    Args:
        speed: factors to choose from, 1.0 among them to keep some as they are. Ko et al., Interspeech 2015, use
            0.9, 1.0, 1.1; pitch follows speed.
        noise: probability that noise is added.
        snr_db: range of the signal-to-noise ratio, uniform in dB.
        colours: kinds of noise to choose from where no recordings are given, of "white" and "pink".
        volume_db: the level changes by up to this much either way, uniform in dB.
        freq_masks, freq_width: SpecAugment masks over features, and the widest of them, in features.
        time_masks, time_share: masks over frames, and the widest of them as a share of the utterance. 2 of 27 and
            10 of 0.05 are NeMo's FastConformer and Canary settings.
    Raises: ConfigError with every field that is out of range.
    """

    speed: tuple[float, ...] = ()
    noise: float = 0.0
    snr_db: tuple[float, float] = (10.0, 30.0)
    colours: tuple[str, ...] = COLOURS
    volume_db: float = 0.0
    freq_masks: int = 0
    freq_width: int = 27
    time_masks: int = 0
    time_share: float = 0.05

    def __post_init__(self) -> None:
        low, high = self.snr_db
        checks = [
            (
                "speed",
                all(0.5 <= factor <= 2.0 for factor in self.speed),
                "factors lie in 0.5 to 2",
                "try 0.9, 1.0, 1.1",
            ),
            ("noise", 0.0 <= self.noise <= 1.0, "is a probability", "give a number from 0 to 1"),
            ("snr_db", -100.0 <= low <= high <= 100.0, "is (low, high) in dB within 100", "try (10, 30)"),
            ("colours", bool(self.colours) and set(self.colours) <= set(COLOURS), f"are of {COLOURS}", "name one"),
            ("volume_db", 0.0 <= self.volume_db <= 60.0, "is a span of 0 to 60 dB", "try 6"),
            ("freq_masks", self.freq_masks >= 0, "counts masks", "give 0 or more"),
            ("freq_width", self.freq_width >= 0, "counts features", "give 0 or more"),
            ("time_masks", self.time_masks >= 0, "counts masks", "give 0 or more"),
            ("time_share", 0.0 <= self.time_share <= 1.0, "is a share of the utterance", "give a number from 0 to 1"),
        ]
        mistakes = [Mistake(name, getattr(self, name), rule, way) for name, holds, rule, way in checks if not holds]
        if mistakes:
            raise ConfigError("augment", mistakes)

    @property
    def changes_audio(self) -> bool:
        """Whether `augment_audio` can change anything; cached features cannot be used where it can."""
        return any(factor != 1.0 for factor in self.speed) or self.noise > 0 or self.volume_db > 0

    @property
    def changes_features(self) -> bool:
        """Whether `spec_augment` can change anything."""
        in_frequency = self.freq_masks > 0 and self.freq_width > 0
        return in_frequency or (self.time_masks > 0 and self.time_share > 0)

    @property
    def enabled(self) -> bool:
        """Whether anything can change at all."""
        return self.changes_audio or self.changes_features


def generator_of(seed: int, epoch: int, utterance: str, purpose: str) -> Generator:
    """The random numbers of one utterance in one epoch; each purpose has its own, so that adding one disturbs none."""
    # Length-prefixed fields, so that no two tuples spell the same bytes.
    key = "".join(f"{len(part)}:{part}" for part in (str(seed), str(epoch), purpose, utterance))
    digest = blake2b(key.encode(), digest_size=16, person=b"augment.v1").digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def feature_generators(seed: int, epoch: int, utterances: Sequence[str]) -> list[Generator]:
    """One generator per utterance, for `spec_augment`."""
    return [generator_of(seed, epoch, utterance, "features") for utterance in utterances]


def speed_factor(settings: Augment, *, seed: int, epoch: int, utterance: str) -> float:
    """The factor that `augment_audio` will use; known without audio, so that a plan can be made of true durations."""
    if not settings.speed:
        return 1.0
    return float(generator_of(seed, epoch, utterance, "speed").choice(settings.speed))


def perturbed_duration(duration: Seconds, factor: float) -> Seconds:
    """How long audio of ``duration`` lasts when played ``factor`` times as fast."""
    return Seconds(duration / factor)


def perturb_speed(audio_N: Audio, factor: float) -> Audio:
    """Play ``factor`` times as fast: round(N / factor) samples, at least 1. Ko et al., Interspeech 2015.

    Returns: ``audio_N`` itself where the factor is 1.
    Raises: ValueError unless factor > 0.
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"factor must be a positive number, but is {factor}; give one such as 0.9 or 1.1")
    if factor == 1.0 or len(audio_N) == 0:
        return audio_N
    length = max(1, round(len(audio_N) / factor))
    # Only the ratio of the two rates matters to the resampler.
    changed: Audio = soxr.resample(audio_N, factor, 1.0).astype(np.float32, copy=False)
    return np.pad(changed[:length], (0, max(0, length - len(changed))))


def coloured_noise(samples: int, colour: str, gen: Generator) -> Audio:
    """Gaussian noise of unit power: white, or pink (power proportional to 1 / frequency, no constant part)."""
    white = gen.standard_normal(samples)
    if colour == "white" or samples < 2:
        return white.astype(np.float32)
    spectrum = np.fft.rfft(white)
    spectrum[0] = 0.0
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    pink = np.fft.irfft(spectrum, n=samples)
    return (pink / max(_rms(pink), 1e-12)).astype(np.float32)


def add_noise(audio_N: Audio, noise_N: Audio, snr_db: float) -> Audio:
    """audio + g noise with 10 log10(power of audio / power of g noise) = snr_db. Silent audio or noise: unchanged.

    The sum may pass full scale: it stays in floating point on its way to the features, where clipping would add a
    distortion of its own.
    """
    audio_rms, noise_rms = _rms(audio_N), _rms(noise_N)
    if audio_rms == 0.0 or noise_rms == 0.0:
        return audio_N
    gain = audio_rms / noise_rms * 10.0 ** (-snr_db / 20.0)
    return (audio_N + np.float32(gain) * noise_N).astype(np.float32)


def augment_audio(
    audio_N: Audio, settings: Augment, *, seed: int, epoch: int, utterance: str, recordings: Sequence[Audio] = ()
) -> Audio:
    """Speed, then noise, then volume, as ``settings`` say.

    Args:
        audio_N: one channel, about -1 to 1.
        recordings: noise at the rate of the audio, used instead of coloured noise; each is cut at a random place and
            repeated where it is too short.
    Returns: float32; ``audio_N`` itself where nothing changes.
    """
    audio_N = perturb_speed(audio_N, speed_factor(settings, seed=seed, epoch=epoch, utterance=utterance))
    if settings.noise > 0:
        gen = generator_of(seed, epoch, utterance, "noise")
        if gen.random() < settings.noise:
            noise_N = _draw_noise(len(audio_N), settings, recordings, gen)
            audio_N = add_noise(audio_N, noise_N, gen.uniform(*settings.snr_db))
    if settings.volume_db > 0:
        gen = generator_of(seed, epoch, utterance, "volume")
        gain = 10.0 ** (gen.uniform(-settings.volume_db, settings.volume_db) / 20.0)
        audio_N = (audio_N * np.float32(gain)).astype(np.float32)
    return audio_N


def spec_augment(features_BTF: Tensor, len_B: Tensor, settings: Augment, generators: Sequence[Generator]) -> Tensor:
    """SpecAugment without warping: zero bands of frequency and stretches of time. Park et al., arXiv:1904.08779.

    Per mask over features: width ~ U{0..freq_width}, start ~ U{0..F - width}. Per mask over time:
    width ~ U{0..floor(time_share * len)}, start ~ U{0..len - width}: a share of the utterance, as in adaptive masking
    (Park et al., arXiv:1912.05533). Zero is the mean of features that their extractor normalises.

    Args: features_BTF: B T F.  len_B: B, int64.  generators: one per utterance, see `feature_generators`.
    Returns: a new tensor; ``features_BTF`` itself where there are no masks. Nothing past ``len_B`` changes.
    Raises: ValueError if the generators are not one per utterance.
    """
    B, T, F = features_BTF.shape
    if len(generators) != B:
        raise ValueError(f"generators must be one per utterance, but there are {len(generators)} for {B} utterances")
    if not settings.changes_features or B == 0:
        return features_BTF
    freq_spans, time_spans = [], []
    for gen, length in zip(generators, len_B.tolist(), strict=True):
        freq_spans.append(_draw_spans(settings.freq_masks, min(settings.freq_width, F), F, gen))
        time_spans.append(_draw_spans(settings.time_masks, int(settings.time_share * length), length, gen))
    device = features_BTF.device
    in_freq_BF = _covered(np.stack(freq_spans), F).to(device)
    in_time_BT = _covered(np.stack(time_spans), T).to(device)
    inside_BT = mask_of(len_B.to(device), T)
    masked_BTF = (in_freq_BF[:, None, :] | in_time_BT[:, :, None]) & inside_BT[:, :, None]
    return features_BTF.masked_fill(masked_BTF, 0.0)


def _rms(samples: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0


def _draw_noise(samples: int, settings: Augment, recordings: Sequence[Audio], gen: Generator) -> Audio:
    if not recordings:
        return coloured_noise(samples, settings.colours[gen.integers(len(settings.colours))], gen)
    noise_N = recordings[int(gen.integers(len(recordings)))]
    if len(noise_N) == 0:
        return np.zeros(samples, dtype=np.float32)
    if len(noise_N) >= samples:
        start = int(gen.integers(len(noise_N) - samples + 1))
        return noise_N[start : start + samples]
    start = int(gen.integers(len(noise_N)))
    return noise_N[np.arange(start, start + samples) % len(noise_N)]


def _draw_spans(masks: int, widest: int, extent: int, gen: Generator) -> NDArray[np.int64]:
    """M 2: first place and the place after the last, of each mask."""
    width_M = gen.integers(0, widest + 1, size=masks)
    start_M = gen.integers(0, extent - width_M + 1)
    return np.stack([start_M, start_M + width_M], axis=-1)


def _covered(spans_BM2: NDArray[np.int64], extent: int) -> Tensor:
    """B extent, True where any of the M spans lies."""
    start_BM1, stop_BM1 = torch.from_numpy(spans_BM2)[..., None].unbind(dim=2)
    place = torch.arange(extent)
    return ((place >= start_BM1) & (place < stop_BM1)).any(dim=1)
