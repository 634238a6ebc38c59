"""A flat start for CTC: before a model says anything, each label is expected in its even share of the frames.

CTC training begins on a plateau where the best that a model can do without listening is to say nothing but blanks. When
it leaves that, if at all, is chance. Hidden Markov models were started from an even segmentation instead (Rabiner,
1989, section V.D), and so is CTC here:

    said_b  = labels on the best path / labels, at most 1
    c_b     = max(0, 1 - 2 said_b)
    loss_b  = (1 - c_b) CTC_b + c_b U_b mean_t -log p_t(label that frame t would have)

over the middle 40 % of each label's share, so that where words meet nothing is said. Once a model says half of an
utterance's labels the loss is CTC's; a tuned model never sees the other. Nothing has to be scheduled, and as every
utterance is weighed by itself, batches may be cut as one likes.

    B  utterances   T  encoder frames   V  vocabulary   U  label tokens
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyvoice.models.anatomy import family_of
from manyvoice.train.objective import Loss, ctc_per_utterance, frames_needed, scores_of
from manyvoice.types import Batch, Padded

# The middle of a label's share: from 30 to 70 %.
MIDDLE = 0.3, 0.7


def flat_ctc(model: PreTrainedModel, batch: Batch) -> Loss:
    """CTC with a flat start; the count ``flat`` is the number of utterances that still start."""
    return flat_ctc_of(scores_of(model, batch), batch, family_of(model).blank(model))


def flat_ctc_of(scores: Padded, batch: Batch, blank: int) -> Loss:
    """:func:`flat_ctc` of scores that are there already."""
    loss_B = ctc_per_utterance(scores, batch.tokens_BU, batch.token_len_B, blank)
    lost = int((frames_needed(batch.tokens_BU, batch.token_len_B) > scores.len_B).sum())
    flat_B = (1 - 2 * said(scores.x.detach(), scores.mask_BT(), blank, batch.token_len_B)).clamp(min=0)
    if flat_B.any():
        flat_B = flat_B.to(loss_B.dtype)
        loss_B = (1 - flat_B) * loss_B + flat_B * even_per_utterance(scores, batch.tokens_BU, batch.token_len_B)
    return Loss(loss_B.sum(), batch.token_len_B.sum(), {"unaligned": float(lost), "flat": float(flat_B.sum())})


def even_per_utterance(scores: Padded, tokens_BU: Tensor, token_len_B: Tensor) -> Tensor:
    """U times the mean of -log p over the middle frames of each label's even share, B; 0 where no frame is in one."""
    dtype = torch.promote_types(scores.x.dtype, torch.float32)
    logp_BTV = scores.x.to(dtype).log_softmax(-1)
    frame_T = torch.arange(logp_BTV.shape[1], device=logp_BTV.device)
    done_BT = frame_T * token_len_B[:, None] / scores.len_B[:, None]  # labels gone by at each frame
    place_BT = done_BT.long().clamp(max=tokens_BU.shape[1] - 1)
    inside_BT = done_BT - done_BT.floor()
    middle_BT = (inside_BT > MIDDLE[0]) & (inside_BT < MIDDLE[1]) & scores.mask_BT()
    label_BT = tokens_BU.gather(1, place_BT)
    nats_BT = -logp_BTV.gather(2, label_BT[:, :, None])[:, :, 0].masked_fill(~middle_BT, 0.0)
    return nats_BT.sum(1) / middle_BT.sum(1).clamp(min=1) * token_len_B


def said(scores_BTV: Tensor, mask_BT: Tensor, blank: int, labels_B: Tensor) -> Tensor:
    """How much of its labels a model says: labels on the best path over labels, at most 1, B; all of no labels."""
    best_BT = scores_BTV.argmax(-1).masked_fill(~mask_BT, blank)
    new_BT = best_BT != blank
    new_BT[:, 1:] &= best_BT[:, 1:] != best_BT[:, :-1]
    return torch.where(labels_B == 0, 1.0, (new_BT.sum(1) / labels_B.clamp(min=1)).clamp(max=1.0))
