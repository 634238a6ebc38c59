"""What training minimises. An objective maps a model and a batch to a :class:`Loss`.

B  utterances   T  encoder frames   V  vocabulary   U  label tokens
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyvoice.models.anatomy import family_of
from manyvoice.types import Batch, Padded, mask_of


@dataclass(frozen=True)
class Loss:
    """A sum and what to divide it by, so that micro-batches and ranks of any size add up exactly.

    Args:
        total: scalar, sum over the batch.  weight: what ``total`` is a sum of, here label tokens.
        counts: further sums for the log, such as utterances that cannot be aligned.
    """

    total: Tensor
    weight: Tensor
    counts: dict[str, float] = field(default_factory=dict)


Objective = Callable[[PreTrainedModel, Batch], Loss]
# Losses of a micro-batch, one after the other: each is back-propagated before the next is asked for. The first says
# what the step's sum and weight are; of the others only gradients and counts are taken.
Passes = Callable[[PreTrainedModel, Batch, int], Generator[Loss, None, None]]


def one_pass(objective: Objective) -> Passes:
    """Plain training's passes: one."""

    def passes(model: PreTrainedModel, batch: Batch, step: int) -> Generator[Loss, None, None]:
        yield objective(model, batch)

    return passes


def ctc_per_utterance(scores: Padded, tokens_BU: Tensor, token_len_B: Tensor, blank: int) -> Tensor:
    """-log p(tokens | scores) of each utterance, B. Graves et al., ICML 2006.

    Computed in float32 at least, and in float64 for float64 scores (the stock loss always falls to float32). An
    utterance with more labels than frames has no alignment: its loss and gradient are zero.
    """
    dtype = torch.promote_types(scores.x.dtype, torch.float32)
    logp_TBV = scores.x.to(dtype).log_softmax(-1).transpose(0, 1)
    return torch.nn.functional.ctc_loss(
        logp_TBV, tokens_BU, scores.len_B, token_len_B, blank=blank, reduction="none", zero_infinity=True
    )


def frames_needed(tokens_BU: Tensor, token_len_B: Tensor) -> Tensor:
    """Frames without which the labels have no alignment, B: one a label, and a blank between two equal ones."""
    equal_BU = tokens_BU[:, 1:] == tokens_BU[:, :-1]
    return token_len_B + (equal_BU & mask_of(token_len_B - 1, equal_BU.shape[1])).sum(1)


def ctc(model: PreTrainedModel, batch: Batch) -> Loss:
    """Sum of the CTC loss over utterances, weighted by label tokens: dividing gives nats per token."""
    return ctc_of(scores_of(model, batch), batch, family_of(model).blank(model))


def scores_of(model: PreTrainedModel, batch: Batch) -> Padded:
    """Scores B T V of a frame-synchronous model."""
    family = family_of(model)
    return family.logits(model, family.encode(model, batch.features_BTF, batch.len_B))


def ctc_of(scores: Padded, batch: Batch, blank: int) -> Loss:
    """:func:`ctc` of scores that are there already."""
    loss_B = ctc_per_utterance(scores, batch.tokens_BU, batch.token_len_B, blank)
    lost = int((frames_needed(batch.tokens_BU, batch.token_len_B) > scores.len_B).sum())
    return Loss(loss_B.sum(), batch.token_len_B.sum(), {"unaligned": float(lost)})
