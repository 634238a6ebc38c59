"""CTC as training takes it: the sum over all paths, and an honest count of what has none."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyvoice.train.objective import ctc_per_utterance, frames_needed
from manyvoice.types import Padded

V, BLANK, LONGEST = 3, 2, 5
LABELS = st.lists(st.integers(0, BLANK - 1), max_size=4)


def paths(frames: int, tokens: list[int]) -> list[tuple[int, ...]]:
    """Every alignment: one symbol a frame that collapses to the tokens."""
    every = itertools.product(range(V), repeat=frames)
    return [p for p in every if [k for k, _ in itertools.groupby(p) if k != BLANK] == tokens]


def padded(tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
    """B U with zeros after each length, and B."""
    rows = [row + [0] * (4 - len(row)) for row in tokens]
    return torch.tensor(rows), torch.tensor([len(row) for row in tokens])


@settings(max_examples=40)
@given(rows=st.lists(st.tuples(st.integers(1, LONGEST), LABELS), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_batch_is_enumerated(rows: list[tuple[int, list[int]]], seed: int) -> None:
    """Loss and gradient of each utterance, whatever lies after its length; nothing where there is no path."""
    gen = torch.Generator().manual_seed(seed)
    x_BTV = torch.randn(len(rows), LONGEST, V, dtype=torch.float64, generator=gen).requires_grad_()
    len_B = torch.tensor([frames for frames, _ in rows])
    tokens_BU, token_len_B = padded([tokens for _, tokens in rows])
    loss_B = ctc_per_utterance(Padded(x=x_BTV, len_B=len_B), tokens_BU, token_len_B, BLANK)
    needed_B = frames_needed(tokens_BU, token_len_B)
    for b, (frames, tokens) in enumerate(rows):
        logp_TV = x_BTV[b].log_softmax(-1)
        every = paths(frames, tokens)
        assert (int(needed_B[b]) <= frames) == bool(every)
        (found,) = torch.autograd.grad(loss_B[b], x_BTV, retain_graph=True)
        if not every:
            assert float(loss_B[b].detach()) == 0 and not found.any()
            continue
        expected = -torch.logsumexp(
            torch.stack([torch.stack([logp_TV[t, k] for t, k in enumerate(path)]).sum() for path in every]), 0
        )
        (gradient,) = torch.autograd.grad(expected, x_BTV)
        assert math.isclose(float(loss_B[b].detach()), float(expected.detach()), rel_tol=1e-12, abs_tol=1e-12)
        torch.testing.assert_close(found, gradient, atol=1e-12, rtol=1e-10)


def test_what_is_certain_is_not_taken_for_impossible() -> None:
    """A model that knows its training text by heart has a loss of exactly nothing in single precision."""
    x_BTV = torch.full((1, 2, V), -50.0)
    x_BTV[0, 0, 0] = x_BTV[0, 1, BLANK] = 50.0
    tokens_BU, token_len_B = padded([[0]])
    scores = Padded(x=x_BTV, len_B=torch.tensor([2]))
    assert float(ctc_per_utterance(scores, tokens_BU, token_len_B, BLANK)[0]) == 0
    assert int(frames_needed(tokens_BU, token_len_B)[0]) == 1


def test_half_precision_scores_are_summed_in_single() -> None:
    x_BTV = torch.randn(1, 4, V).to(torch.bfloat16)
    tokens_BU, token_len_B = padded([[0, 1]])
    low, high = (
        ctc_per_utterance(Padded(x=x, len_B=torch.tensor([4])), tokens_BU, token_len_B, BLANK)
        for x in (x_BTV, x_BTV.double())
    )
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), high, atol=1e-6, rtol=1e-6)
