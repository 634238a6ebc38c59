"""Batches: an utterance's features depend on nothing but itself, the seed and the epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.data.augment import Augment
from manyvoice.data.collate import CachedFeatures, Collator, LiveFeatures, decoded, read_ahead
from manyvoice.data.features import LogMel
from manyvoice.data.manifest import Corpus, open_corpus
from manyvoice.data.pauses import cut_at_pauses
from manyvoice.errors import AudioError, ModelError
from manyvoice.types import Seconds

AUGMENT = Augment(speed=(0.9, 1.0, 1.1), noise=0.5, freq_masks=2, freq_width=20, time_masks=2, time_share=0.1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, speak_tones: Callable[[Path, int, int], Path]) -> Corpus:
    return open_corpus(speak_tones(tmp_path_factory.mktemp("speech") / "tones", 9, 0))


@pytest.fixture(scope="module")
def log_mel() -> LogMel:
    return LogMel.build({"feature_size": 80})


@pytest.fixture
def collator(corpus: Corpus, log_mel: LogMel) -> Collator:
    tokens = [list(range(1, 1 + len(t.split()))) for t in corpus.texts()]
    return Collator(corpus, LiveFeatures(corpus, log_mel, AUGMENT, seed=3), tokens, augment=AUGMENT, seed=3)


def test_features_do_not_depend_on_batch_mates(collator: Collator) -> None:
    together = collator([4, 1, 7, 2], epoch=5)
    for b, index in enumerate((4, 1, 7, 2)):
        alone = collator([index], epoch=5)
        n = int(together.len_B[b])
        assert torch.equal(together.features_BTF[b, :n], alone.features_BTF[0])
        assert not together.features_BTF[b, n:].any()
        assert together.ids[b] == alone.ids[0]
        u = int(together.token_len_B[b])
        assert torch.equal(together.tokens_BU[b, :u], alone.tokens_BU[0])


def test_epochs_differ_and_repeat(collator: Collator) -> None:
    one, other, again = (collator([0, 1], epoch=e).features_BTF for e in (0, 1, 0))
    assert torch.equal(one, again)
    assert one.shape != other.shape or not torch.equal(one, other)


def test_workers_make_the_same_bits_and_leave_the_random_stream_alone(collator: Collator) -> None:
    batches = [np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 6, 7, 8])]
    state = torch.get_rng_state()
    here = list(read_ahead(collator, batches, epoch=2))
    assert torch.equal(torch.get_rng_state(), state)
    there = list(read_ahead(collator, batches, epoch=2, workers=2))
    for a, b in zip(here, there, strict=True):
        assert a.ids == b.ids and torch.equal(a.features_BTF, b.features_BTF)


def test_owners_and_labels_default_to_the_base_and_none(corpus: Corpus, collator: Collator) -> None:
    batch = collator([2, 3])
    assert batch.owner_B.tolist() == [0, 0] and batch.label_B.tolist() == [-1, -1]
    owned = Collator(corpus, collator.features, collator.tokens, owners=range(9), labels=range(9))([2, 3])
    assert owned.owner_B.tolist() == owned.label_B.tolist() == [2, 3]


def test_cached_features_are_the_live_ones_in_half_precision(corpus: Corpus, log_mel: LogMel, tmp_path: Path) -> None:
    live = LiveFeatures(corpus, log_mel)
    for _ in range(2):  # made, then opened
        cached = CachedFeatures.build(corpus, log_mel, tmp_path / "cache")
        for i in range(len(corpus)):
            assert torch.equal(cached.of(i, 0), live.of(i, 0).half().float())


def test_cached_samples_are_augmented_like_decoded_ones(corpus: Corpus, log_mel: LogMel, tmp_path: Path) -> None:
    live = LiveFeatures(corpus, log_mel, AUGMENT, 3)
    for _ in range(2):  # made, then opened
        cached = LiveFeatures(corpus, log_mel, AUGMENT, 3, decoded(corpus, 16_000, tmp_path / "cache"))
        for i in (0, 4, 8):
            assert torch.equal(cached.of(i, 1), live.of(i, 1))  # the tones are 16-bit files


def test_features_are_the_stock_ones_without_the_masked_last_frame(log_mel: LogMel) -> None:
    samples = [np.random.default_rng(i).normal(0, 0.1, 16_000 + 4_000 * i).astype(np.float32) for i in range(3)]
    stock = log_mel.stock(samples, sampling_rate=16_000, return_tensors="pt")
    for i, x in enumerate(samples):
        features = log_mel(x)
        assert len(features) == log_mel.frames_of(len(x)) == int(stock["attention_mask"][i].sum())
        torch.testing.assert_close(features, stock["input_features"][i, : len(features)], atol=1e-5, rtol=1e-5)


def test_too_short_a_sound_is_refused_and_settings_are_kept(log_mel: LogMel, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"200 samples are too short to recognise; at least 0\.02 s"):
        log_mel(np.zeros(200, dtype=np.float32))
    log_mel.save(tmp_path)
    assert LogMel.load(tmp_path).settings() == log_mel.settings()
    with pytest.raises(ModelError, match="no feature extractor"):
        LogMel.load(tmp_path / "nothing")


@given(
    seconds=st.floats(0.0, 20.0), longest=st.floats(0.3, 6.0), seed=st.integers(0, 3)
)  # fmt: skip
def test_pieces_tile_the_recording_and_are_never_too_long(seconds: float, longest: float, seed: int) -> None:
    rate = 1000
    samples = np.random.default_rng(seed).normal(0, 1, round(seconds * rate))
    pieces = cut_at_pauses(samples, rate, Seconds(longest))
    assert pieces[0][0] == 0 and pieces[-1][1] == len(samples)
    assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:], strict=False))
    assert all(stop - start <= round(longest * rate) for start, stop in pieces)


def test_the_cut_lies_in_the_silence() -> None:
    rate = 16_000
    samples = np.random.default_rng(0).normal(0, 0.1, 20 * rate)
    samples[int(7.0 * rate) : int(7.4 * rate)] = 0.0
    (_, cut), *_ = cut_at_pauses(samples, rate, Seconds(10.0))
    assert 7.0 <= cut / rate <= 7.4
