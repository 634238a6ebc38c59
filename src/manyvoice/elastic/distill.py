"""In-place distillation: subnets learn from the largest model's posteriors of the same step, frame by frame.

p  teacher's probabilities   q  student's   t = p / q
B  utterances   T  encoder frames   V  vocabulary, blank included
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# AlphaNet's constants (arXiv:2102.07954, its published code): both ends of alpha, and where t^alpha is cut off.
ALPHA_MIN, ALPHA_MAX, CLIP = -1.0, 1.0, 5.0
_NEARLY = 1e-3

Divergence = Callable[[Tensor, Tensor], Tensor]


def alpha_divergence(teacher_V: Tensor, student_V: Tensor, alpha: float) -> Tensor:
    """D_alpha(p || q) = sum_v q_v (t_v^alpha - 1) / (alpha (alpha - 1)), shape of the scores without V.

    Minka, 2005; alpha = 1 is KL(p || q), alpha = 0 is KL(q || p). Scores are before the softmax. Never negative.
    """
    logp, logq = teacher_V.log_softmax(-1), student_V.log_softmax(-1)
    if abs(alpha - 1) < _NEARLY:
        return (logp.exp() * (logp - logq)).sum(-1)
    if abs(alpha) < _NEARLY:
        return (logq.exp() * (logq - logp)).sum(-1)
    return ((alpha * logp + (1 - alpha) * logq).exp().sum(-1) - 1) / (alpha * (alpha - 1))


def surrogate(teacher_V: Tensor, student_V: Tensor, alpha: float, clip: float = CLIP) -> Tensor:
    """A loss whose gradient in the student is that of D_alpha, its importance weights clipped.

    ``-sum_v [q rho]_v log q_v`` with gradient through log q only; rho = t^alpha / alpha + 1 / (alpha (alpha - 1)),
    t^alpha at most ``clip``; rho = t at alpha = 1, log t - 1 at 0 with t at most ``clip`` (Wang et al.,
    arXiv:2102.07954). At alpha = 1 that is cross entropy, whatever the clip, as in AlphaNet's code.
    """
    logq = student_V.log_softmax(-1)
    with torch.no_grad():
        q = logq.exp()
        logt = teacher_V.log_softmax(-1) - logq
        if abs(alpha - 1) < _NEARLY:
            weight = (logt + logq).exp()  # q t = p, without dividing by q
        elif abs(alpha) < _NEARLY:
            weight = q * (logt.clamp(max=math.log(clip)) - 1)
        else:
            rho = (alpha * logt).clamp(max=math.log(clip)).exp() / alpha + 1 / (alpha * (alpha - 1))
            weight = q * rho
    return -(weight * logq).sum(-1)


def adaptive_alpha(teacher_V: Tensor, student_V: Tensor, clip: float = CLIP) -> Tensor:
    """The surrogate of D_{-1} or of D_{+1}, whichever divergence is larger, element by element.

    Alpha above 0 penalises a student that says little where the teacher says much; below 0, the other way round.
    """
    with torch.no_grad():
        low = clipped_divergence(teacher_V, student_V, ALPHA_MIN, clip)
        high = clipped_divergence(teacher_V, student_V, ALPHA_MAX, clip)
    return torch.where(
        low > high,
        surrogate(teacher_V, student_V, ALPHA_MIN, clip),
        surrogate(teacher_V, student_V, ALPHA_MAX, clip),
    )


def clipped_divergence(teacher_V: Tensor, student_V: Tensor, alpha: float, clip: float = CLIP) -> Tensor:
    """D_alpha with t^alpha at most ``clip``, as the choice of alpha is made."""
    if abs(alpha - 1) < _NEARLY or abs(alpha) < _NEARLY:
        return alpha_divergence(teacher_V, student_V, alpha)
    logp, logq = teacher_V.log_softmax(-1), student_V.log_softmax(-1)
    power = (alpha * (logp - logq)).clamp(max=math.log(clip)).exp()
    return (logq.exp() * (power - 1)).sum(-1) / (alpha * (alpha - 1))


def kl(teacher_V: Tensor, student_V: Tensor) -> Tensor:
    """KL(p || q) up to the teacher's entropy, which has no gradient: cross entropy."""
    return surrogate(teacher_V, student_V, 1.0)


DIVERGENCES: dict[str, Divergence] = {"alpha": adaptive_alpha, "kl": kl}


def frames_distilled(divergence: Divergence, teacher_BTV: Tensor, student_BTV: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum of a divergence over an utterance's frames, B; the teacher gets no gradient. In float32 at least."""
    dtype = torch.promote_types(student_BTV.dtype, torch.float32)
    found_BT = divergence(teacher_BTV.detach().to(dtype), student_BTV.to(dtype))
    return found_BT.masked_fill(~mask_BT, 0.0).sum(1)
