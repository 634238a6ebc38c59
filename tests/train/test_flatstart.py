"""The flat start against loops written out; it is additive, and gone once a model speaks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyvoice.train.flatstart import MIDDLE, even_per_utterance, flat_ctc_of, said
from manyvoice.train.objective import ctc_of, ctc_per_utterance
from manyvoice.types import Batch, Padded

BLANK = 0


def made(seed: int = 0) -> tuple[Padded, Batch]:
    gen = torch.Generator().manual_seed(seed)
    len_B, token_len_B = torch.tensor([11, 7, 9]), torch.tensor([3, 2, 0])
    tokens_BU = torch.randint(1, 5, (3, 3), generator=gen) * (torch.arange(3) < token_len_B[:, None])
    scores = Padded(x=torch.randn(3, 11, 5, generator=gen, dtype=torch.float64), len_B=len_B)
    zeros = torch.zeros(3, dtype=torch.int64)
    return scores, Batch(
        ids=("a", "b", "c"), features_BTF=torch.zeros(3, 44, 1), len_B=len_B * 4, tokens_BU=tokens_BU,
        token_len_B=token_len_B, owner_B=zeros, label_B=zeros, seconds_B=zeros.double(),
    )  # fmt: skip


def silent(scores: Padded) -> Padded:
    bias = torch.zeros(5, dtype=torch.float64)
    bias[BLANK] = 30
    return Padded(x=scores.x + bias, len_B=scores.len_B)


def even_by_hand(x_TV: Tensor, frames: int, labels: list[int]) -> float:
    found = []
    for t in range(frames):
        done = t * len(labels) / frames
        if MIDDLE[0] < done - int(done) < MIDDLE[1]:
            found.append(-float(x_TV[t].log_softmax(-1)[labels[int(done)]]))
    return len(labels) * sum(found) / max(1, len(found))


def test_even_shares_by_hand() -> None:
    scores, batch = made()
    found = even_per_utterance(scores, batch.tokens_BU, batch.token_len_B)
    for b in range(3):
        labels = batch.tokens_BU[b, : batch.token_len_B[b]].tolist()
        assert float(found[b]) == pytest.approx(even_by_hand(scores.x[b], int(scores.len_B[b]), labels))


def test_a_silent_model_starts_flat_and_a_speaking_one_not() -> None:
    scores, batch = made()
    quiet = silent(scores)
    loss = flat_ctc_of(quiet, batch, BLANK)
    even = even_per_utterance(quiet, batch.tokens_BU, batch.token_len_B)[:2]
    rest = ctc_per_utterance(quiet, batch.tokens_BU, batch.token_len_B, BLANK)[2]  # nothing to say is said
    assert loss.counts["flat"] == 2
    torch.testing.assert_close(loss.total, even.sum() + rest)
    loud = Padded(x=torch.nn.functional.one_hot(torch.tensor([[1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1]] * 3), 5) * 9.0,
                  len_B=scores.len_B)  # fmt: skip
    assert flat_ctc_of(loud, batch, BLANK).counts["flat"] == 0
    torch.testing.assert_close(flat_ctc_of(loud, batch, BLANK).total, ctc_of(loud, batch, BLANK).total)


@pytest.mark.parametrize("quieter", [False, True])
def test_a_batch_is_the_sum_of_its_utterances(quieter: bool) -> None:
    scores, batch = made(3)
    scores = silent(scores) if quieter else scores
    alone = []
    for b in range(3):
        T = int(scores.len_B[b])
        one = Padded(x=scores.x[b : b + 1, :T], len_B=scores.len_B[b : b + 1])
        row = batch.rows(b, b + 1)
        alone.append(flat_ctc_of(one, row, BLANK).total if batch.token_len_B[b] else None)
    whole = flat_ctc_of(scores, batch, BLANK).total
    empty = ctc_per_utterance(scores, batch.tokens_BU, batch.token_len_B, BLANK)[2]
    torch.testing.assert_close(whole, sum(a for a in alone if a is not None) + empty)


def test_gradients_are_those_of_the_formula() -> None:
    scores, batch = made(5)
    x = (scores.x + torch.tensor([2.5, 0, 0, 0, 0])).requires_grad_()
    flat_ctc_of(Padded(x=x, len_B=scores.len_B), batch, BLANK).total.backward()
    share_B = (1 - 2 * said(x.detach(), scores.mask_BT(), BLANK, batch.token_len_B)).clamp(min=0)
    assert 0 < float(share_B.sum()) < 2
    y = x.detach().clone().requires_grad_()
    again = Padded(x=y, len_B=scores.len_B)
    ctc_B = ctc_per_utterance(again, batch.tokens_BU, batch.token_len_B, BLANK)
    even_B = even_per_utterance(again, batch.tokens_BU, batch.token_len_B)
    ((1 - share_B) * ctc_B + share_B * even_B).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_what_a_model_says_counts_tokens_and_not_frames() -> None:
    best = [[1, 1, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0], [3, 0, 3, 3, 1, 2], [0, 0, 0, 1, 2, 3]]
    mask = torch.tensor([[True] * 6, [True] * 6, [True] * 6, [True] * 3 + [False] * 3])
    scores = torch.nn.functional.one_hot(torch.tensor(best), 4).float()
    assert said(scores, mask, BLANK, torch.tensor([4, 2, 2, 0])).tolist() == [0.75, 0.0, 1.0, 1.0]
