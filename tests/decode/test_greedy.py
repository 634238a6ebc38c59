import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.decode.greedy import best_paths, greedy
from manyvoice.errors import DecodeError


def emissions(path, V, extra=0):
    logp_TV = torch.full((len(path) + extra, V), -5.0)
    logp_TV[range(len(path)), path] = -0.5
    return logp_TV


def test_repeats_collapse_and_blanks_part_them():
    logp_BTV = emissions([0, 1, 1, 0, 1, 2, 2, 0], 3)[None]
    assert greedy(logp_BTV, torch.tensor([8]), 0) == [[1, 1, 2]]


def test_frames_beyond_the_length_are_not_heard():
    logp_BTV = emissions([1, 0, 2, 2], 3)[None].repeat(5, 1, 1)
    assert greedy(logp_BTV, torch.arange(5), 0) == [[], [1], [1], [1, 2], [1, 2]]


@given(path=st.lists(st.integers(0, 3), max_size=8), blank=st.integers(0, 3), extra=st.integers(0, 3))
def test_any_path_any_blank(path, blank, extra):
    logp_BTV = emissions(path, 4, extra)[None]
    expected = [token for token, _ in itertools.groupby(path) if token != blank]
    (found,) = best_paths(logp_BTV, torch.tensor([len(path)]), blank)
    assert list(found.tokens) == expected
    assert found.score == pytest.approx(-0.5 * len(path))


def test_the_score_is_the_best_of_all_paths():
    logp_TV = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    (found,) = best_paths(logp_TV[None], torch.tensor([4]), 2)
    every = [sum(float(logp_TV[t, v]) for t, v in enumerate(path)) for path in itertools.product(range(3), repeat=4)]
    assert found.score == pytest.approx(max(every), abs=1e-12)


def test_half_precision_and_padding_of_minus_infinity():
    logp_BTV = emissions([1, 2], 3, extra=2)[None].bfloat16()
    logp_BTV[:, 2:] = -torch.inf
    (found,) = best_paths(logp_BTV, torch.tensor([2]), 0)
    assert found.tokens == (1, 2)
    assert found.score == -1.0


def test_no_frames_at_all():
    assert greedy(torch.zeros(2, 0, 3), torch.tensor([0, 0]), 0) == [[], []]


@pytest.mark.parametrize(
    ("logp", "length", "blank", "message"),
    [
        (torch.zeros(4, 3), [4], 0, r"logp_BTV must be a float tensor of B T V"),
        (torch.zeros(1, 4, 3, dtype=torch.int64), [4], 0, r"logp_BTV must be a float tensor"),
        (torch.zeros(1, 4, 3), [4, 4], 0, r"one length for each of the 1 utterances"),
        (torch.zeros(1, 4, 3), [5], 0, r"len_B\[0\] is 5, but must lie between 0 and the 4 frames"),
        (torch.zeros(1, 4, 3), [-1], 0, r"len_B\[0\] is -1"),
        (torch.zeros(1, 4, 3), [4], 3, r"blank must be a token id below 3, but is 3"),
        (torch.full((1, 4, 3), torch.nan), [1], 0, r"logp_BTV\[0\] holds NaN inside its length"),
    ],
)
def test_what_does_not_fit_is_refused(logp, length, blank, message):
    with pytest.raises(DecodeError, match=message):
        greedy(logp, torch.tensor(length), blank)


def test_nan_in_the_padding_does_not_matter():
    logp_BTV = emissions([1], 3, extra=1)[None]
    logp_BTV[0, 1] = torch.nan
    (found,) = best_paths(logp_BTV, torch.tensor([1]), 0)
    assert found.tokens == (1,)
    assert found.score == -0.5
