"""Utterances to batches: features live or from a cache, augmented by seed, epoch and id alone, then padded.

N  samples   T  feature frames   F  mel bins   U  label tokens
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from manyvoice.data.audio import from_int16, to_int16
from manyvoice.data.augment import Augment, augment_audio, feature_generators, spec_augment
from manyvoice.data.cache import RaggedCache
from manyvoice.data.features import LogMel, half
from manyvoice.data.manifest import Corpus
from manyvoice.types import Batch


class Features(ABC):
    """Where an utterance's features come from."""

    @abstractmethod
    def of(self, index: int, epoch: int) -> Tensor:
        """T F in float32 of one utterance in one epoch."""


@final
class LiveFeatures(Features):
    """Audio read, augmented and analysed each time.

    Args: audio: decoded samples of the same corpus; without it every sound is decoded again in every epoch.
    """

    def __init__(
        self,
        corpus: Corpus,
        log_mel: LogMel,
        augment: Augment | None = None,
        seed: int = 0,
        audio: RaggedCache | None = None,
    ) -> None:
        self.corpus, self.log_mel, self.augment, self.seed, self.audio = corpus, log_mel, augment, seed, audio

    def of(self, index: int, epoch: int) -> Tensor:
        """T F; waveform augmentation follows from (seed, epoch, utterance id)."""
        utterance = self.corpus[index]
        rate = self.log_mel.rate
        samples_N = utterance.audio.read(rate) if self.audio is None else from_int16(self.audio[index])
        if self.augment is not None and self.augment.changes_audio:
            samples_N = augment_audio(samples_N, self.augment, seed=self.seed, epoch=epoch, utterance=utterance.id)
        return self.log_mel(samples_N)


@final
class CachedFeatures(Features):
    """Features computed once and kept on disk as float16; waveform augmentation has no say."""

    def __init__(self, cache: RaggedCache) -> None:
        self.cache = cache

    def of(self, index: int, epoch: int) -> Tensor:
        """T F, the same in every epoch."""
        return torch.from_numpy(np.array(self.cache[index], dtype=np.float32))

    @staticmethod
    def key(corpus: Corpus, log_mel: LogMel) -> str:
        """What the features were made from, and how."""
        return f"{corpus.fingerprint} {log_mel.settings()}"

    @classmethod
    def build(
        cls, corpus: Corpus, log_mel: LogMel, folder: Path, progress: Callable[[int, int], None] | None = None
    ) -> CachedFeatures:
        """Open the cache of this corpus and these settings, or make it: about 16 kB a second of speech."""

        def rows() -> Iterator[np.ndarray]:
            for done, utterance in enumerate(corpus):
                yield half(log_mel(utterance.audio.read(log_mel.rate)))
                if progress is not None:
                    progress(done + 1, len(corpus))

        key = cls.key(corpus, log_mel)
        if RaggedCache.exists(folder, key):
            return cls(RaggedCache.open(folder, key))
        return cls(RaggedCache.build(folder, key, rows(), dtype=np.float16, width=log_mel.bins))


@final
class HeldFeatures(Features):
    """Features of some rows of a corpus, computed once and held in memory as float16: 16 kB a second of speech."""

    def __init__(
        self,
        corpus: Corpus,
        log_mel: LogMel,
        rows: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._held: dict[int, np.ndarray] = {}
        for done, i in enumerate(rows, start=1):
            self._held[i] = half(log_mel(corpus[i].audio.read(log_mel.rate)))
            if progress is not None:
                progress(done, len(rows))

    def of(self, index: int, epoch: int) -> Tensor:
        """T F, the same in every epoch. KeyError for a row that was not asked for."""
        return torch.from_numpy(self._held[index].astype(np.float32))


@final
class Picked(Features):
    """Features of a subset of a corpus, from those of the whole; ``rows`` are what ``subset`` was given."""

    def __init__(self, features: Features, rows: Sequence[int]) -> None:
        self.features, self.rows = features, rows

    def of(self, index: int, epoch: int) -> Tensor:
        """T F of the subset's row."""
        return self.features.of(self.rows[index], epoch)


def decoded(corpus: Corpus, rate: int, folder: Path, progress: Callable[[int, int], None] | None = None) -> RaggedCache:
    """Open the cache of a corpus's samples, or make it: 16 bits, 32 kB a second at 16 kHz."""

    def rows() -> Iterator[np.ndarray]:
        for done, utterance in enumerate(corpus):
            yield to_int16(utterance.audio.read(rate))
            if progress is not None:
                progress(done + 1, len(corpus))

    key = f"{corpus.fingerprint} samples at {rate} Hz"
    if RaggedCache.exists(folder, key):
        return RaggedCache.open(folder, key)
    return RaggedCache.build(folder, key, rows(), dtype=np.int16)


@final
class Collator:
    """Indices to a :class:`Batch`.

    Args:
        corpus: whose rows the indices name.  features: of the same corpus.
        tokens: label tokens of every row.
        augment: SpecAugment's settings; evaluation passes none.  seed: of the run.
        owners, labels: submodel row and class of every row, if any.
    """

    def __init__(
        self,
        corpus: Corpus,
        features: Features,
        tokens: Sequence[Sequence[int]],
        *,
        augment: Augment | None = None,
        seed: int = 0,
        owners: Sequence[int] | None = None,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.corpus, self.features, self.tokens = corpus, features, tokens
        self.augment, self.seed = augment, seed
        self.owners, self.labels = owners, labels

    def __call__(self, indices: Sequence[int] | np.ndarray, epoch: int = 0) -> Batch:
        """The batch of those rows in that epoch."""
        rows = [int(i) for i in indices]
        utterances = [self.corpus[i] for i in rows]
        features = [self.features.of(i, epoch) for i in rows]
        tokens = [torch.as_tensor(self.tokens[i], dtype=torch.int64) for i in rows]
        len_B = torch.tensor([len(f) for f in features], dtype=torch.int64)
        features_BTF = pad_sequence(features, batch_first=True)
        ids = tuple(u.id for u in utterances)
        if self.augment is not None and self.augment.changes_features:
            generators = feature_generators(self.seed, epoch, ids)
            features_BTF = spec_augment(features_BTF, len_B, self.augment, generators)
        return Batch(
            ids=ids,
            features_BTF=features_BTF,
            len_B=len_B,
            tokens_BU=pad_sequence(tokens, batch_first=True),
            token_len_B=torch.tensor([len(t) for t in tokens], dtype=torch.int64),
            owner_B=_column(self.owners, rows, 0),
            label_B=_column(self.labels, rows, -1),
            seconds_B=torch.tensor([float(u.duration) for u in utterances], dtype=torch.float64),
        )


def _column(values: Sequence[int] | None, rows: Sequence[int], default: int) -> Tensor:
    return torch.tensor([default if values is None else values[i] for i in rows], dtype=torch.int64)


class _Batches(Dataset[Batch]):
    """Micro-batches of one epoch by number, so that workers can make them in any order."""

    def __init__(self, collator: Collator, batches: Sequence[np.ndarray], epoch: int) -> None:
        self.collator, self.batches, self.epoch = collator, batches, epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> Batch:
        return self.collator(self.batches[k], self.epoch)


def read_ahead(collator: Collator, batches: Sequence[np.ndarray], epoch: int, workers: int = 0) -> Iterator[Batch]:
    """Batches in the order given, made by worker processes if there are any; the same bits whatever their number."""
    loader: DataLoader[Batch] = DataLoader(
        _Batches(collator, batches, epoch),
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        # its own: a loader draws a seed from the global stream, which would shift dropout after a resume
        generator=torch.Generator(),
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)
