import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.decode.align import Alignment, align, ctc_min_frames, words
from manyvoice.errors import DecodeError
from manyvoice.types import Seconds


def random_logp(T, V, seed):
    return torch.randn(T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def collapse(path, blank):
    return [token for token, _ in itertools.groupby(path) if token != blank]


def best_path(logp_TV, tokens, blank):
    T, V = logp_TV.shape
    paths = [p for p in itertools.product(range(V), repeat=T) if collapse(p, blank) == list(tokens)]
    return max(((sum(float(logp_TV[t, v]) for t, v in enumerate(p)), p) for p in paths), default=None)


@given(
    T=st.integers(1, 5),
    tokens=st.lists(st.integers(0, 1), max_size=4),
    seed=st.integers(0, 99),
    blank=st.integers(0, 2),
)
def test_the_best_of_all_paths(T, tokens, seed, blank):
    tokens = [token + (token >= blank) for token in tokens]
    logp_TV = random_logp(T, 3, seed)
    expected = best_path(logp_TV, tokens, blank)
    if expected is None:
        assert ctc_min_frames(tokens) > T
        with pytest.raises(DecodeError, match=rf"need at least {ctc_min_frames(tokens)} frames .* there are {T}"):
            align(logp_TV, tokens, blank)
        return
    score, path = expected
    found = align(logp_TV, tokens, blank)
    assert found.score == pytest.approx(score, abs=1e-12)
    runs = [list(run) for v, run in itertools.groupby(range(T), key=lambda t: path[t]) if v != blank]
    assert found.first == tuple(run[0] for run in runs)
    assert found.last == tuple(run[-1] for run in runs)
    for u, run in enumerate(runs):
        mean = sum(math.exp(float(logp_TV[t, tokens[u]])) for t in run) / len(run)
        assert found.confidence[u] == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize(("tokens", "frames"), [([], 0), ([1], 1), ([1, 2], 2), ([1, 1], 3), ([1, 1, 1, 2, 2], 8)])
def test_min_frames(tokens, frames):
    assert ctc_min_frames(tokens) == frames


def test_exactly_enough_frames():
    found = align(random_logp(5, 4, 0), [1, 1, 1], 0)
    assert (found.first, found.last) == ((0, 2, 4), (0, 2, 4))


def test_float32_on_a_long_utterance():
    logp_TV = random_logp(400, 30, 0).float()
    tokens = torch.randint(1, 30, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    found = align(logp_TV, tokens, 0)
    assert found.tokens == tuple(tokens)
    assert all(a <= b for a, b in zip(found.first, found.last, strict=True))
    assert all(a < b for a, b in zip(found.last, found.first[1:], strict=False))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0], r"tokens_U\[0\] is 0, but must be a label id below 3 and not the blank \(0\)"),
        ([1, 3], r"tokens_U\[1\] is 3"),
        ([1, 1, 1], r"3 tokens need at least 5 frames \(a repeat needs a blank between\), but there are 4"),
    ],
)
def test_tokens_that_cannot_be_aligned(tokens, message):
    with pytest.raises(DecodeError, match=message):
        align(random_logp(4, 3, 0), tokens, 0)


def test_emissions_that_cannot_be_aligned():
    logp_TV = random_logp(4, 3, 0)
    with pytest.raises(DecodeError, match="logp_TV must be a float tensor of T V"):
        align(logp_TV[None], [1], 0)
    with pytest.raises(DecodeError, match="blank must be a token id below 3, but is 7"):
        align(logp_TV, [1], 7)
    with pytest.raises(DecodeError, match="logp_TV holds NaN"):
        align(logp_TV * torch.nan, [1], 0)
    logp_TV[:, 1] = -torch.inf
    with pytest.raises(DecodeError, match="no path spells the 1 tokens"):
        align(logp_TV, [1], 0)


STRINGS = ["<blank>", "▁he", "llo", "▁", "w", "▁w"]


def alignment(tokens, first, last, confidence):
    return Alignment(
        tokens=tuple(tokens), first=tuple(first), last=tuple(last), confidence=tuple(confidence), score=0.0
    )


def test_words_take_the_frames_of_their_letters():
    found = words(
        alignment([1, 2, 3, 4], [2, 4, 6, 9], [2, 5, 7, 9], [0.9, 0.6, 0.1, 0.5]), STRINGS, "prefix", Seconds(0.04)
    )
    assert [word.text for word in found] == ["hello", "w"]
    assert [(word.start, word.end) for word in found] == [
        (pytest.approx(0.08), pytest.approx(0.24)),
        (pytest.approx(0.36), pytest.approx(0.40)),
    ]
    assert found[0].confidence == pytest.approx((0.9 + 0.6 * 2) / 3), "a frame counts once"
    assert found[1].confidence == pytest.approx(0.5), "the lone mark does not count"


def test_the_first_piece_opens_a_word_with_or_without_a_mark():
    found = words(alignment([2, 3, 5], [0, 1, 2], [0, 1, 2], [1, 1, 1]), STRINGS, "prefix", Seconds(1.0))
    assert [word.text for word in found] == ["llo", "w"]


def test_every_token_is_a_word():
    found = words(alignment([1, 2], [0, 1], [0, 3], [1, 1]), ["", "hello", "world"], "every", Seconds(0.5))
    assert [(word.text, word.start, word.end) for word in found] == [("hello", 0.0, 0.5), ("world", 0.5, 2.0)]


def test_no_words():
    assert words(align(random_logp(3, 3, 0), [], 0), STRINGS, "prefix", Seconds(0.04)) == []


def test_the_frame_must_last():
    with pytest.raises(DecodeError, match="frame must be the seconds of one encoder frame, above 0, but is 0"):
        words(alignment([], [], [], []), STRINGS, "prefix", Seconds(0.0))
