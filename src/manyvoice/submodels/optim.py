"""Training many submodels together as if each were alone: loss, clipping and optimiser steps by owner.

S  rows of a bank   B  utterances   P  rows present in a step
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from manyvoice.errors import UsageError


def per_owner(loss_B: Tensor, owner_B: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Sum over owners of the mean over each one's utterances; a scalar.

    What an owner's gradient is does then not depend on who else is in the batch.

    Args: weight_B: of each utterance in its owner's mean, such as its label tokens.
    """
    return owner_means(loss_B, owner_B, weight_B)[1].sum()


def owner_means(loss_B: Tensor, owner_B: Tensor, weight_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows present, ascending, P; and the mean over each one's utterances, P, weighted as in :func:`per_owner`."""
    weight_B = torch.ones_like(loss_B) if weight_B is None else weight_B.to(loss_B.dtype)
    rows_P, place_B = owner_B.unique(return_inverse=True)
    zero_P = torch.zeros(len(rows_P), dtype=loss_B.dtype, device=loss_B.device)
    return rows_P, zero_P.index_add(0, place_B, loss_B * weight_B) / zero_P.index_add(0, place_B, weight_B)


@final
class RowAdamW:
    """AdamW over rows, each with a step counter of its own (Loshchilov & Hutter, arXiv:1711.05101).

    Rows that are absent from a step are not touched: no momentum, no decay, no tick. The gradient of each row, over all
    tensors, is clipped to ``clip`` by itself. Tensors whose rows are vectors do not decay.

    Args: tensors: all with the same leading axis.  lr: one, or one for each row.
    """

    def __init__(
        self,
        tensors: Sequence[nn.Parameter],
        lr: float | Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
    ) -> None:
        if len({len(t) for t in tensors}) != 1:
            raise UsageError("a row optimiser wants tensors with one leading axis in common")
        self.tensors, self.betas, self.eps, self.weight_decay, self.clip = list(tensors), betas, eps, weight_decay, clip
        first = self.tensors[0]
        self.lr_S = torch.as_tensor(lr, dtype=torch.float64, device=first.device).expand(len(first)).clone()
        self.steps_S = torch.zeros(len(first), dtype=torch.int64, device=first.device)
        self.first = [torch.zeros_like(t) for t in self.tensors]
        self.second = [torch.zeros_like(t) for t in self.tensors]

    def step(self, owner_B: Tensor, *, scale: float = 1.0) -> None:
        """Move the rows that a batch had by their gradients; row 0, the identity, never.

        Args: scale: of the learning rates, for a schedule.
        """
        rows_P = owner_B.unique().to(self.steps_S.device)
        rows_P = rows_P[rows_P > 0]
        grads = [torch.zeros_like(t[rows_P]) if t.grad is None else t.grad[rows_P] for t in self.tensors]
        self.step_rows(rows_P, grads, scale=scale)

    @torch.no_grad()
    def step_rows(self, rows_P: Tensor, grads: Sequence[Tensor], *, scale: float = 1.0) -> None:
        """As :meth:`step` with gradients given, each P times the shape of a row; ``rows_P`` without the identity."""
        if len(rows_P) == 0:
            return
        self.steps_S[rows_P] += 1
        clip_P = self._clip(grads)
        b1, b2 = self.betas
        steps_P = self.steps_S[rows_P].double()
        for t, g, m, v in zip(self.tensors, grads, self.first, self.second, strict=True):
            shape = (-1, *[1] * (t.ndim - 1))
            g = g * clip_P.view(shape).to(g.dtype)
            m_P = b1 * m[rows_P] + (1 - b1) * g
            v_P = b2 * v[rows_P] + (1 - b2) * g * g
            m[rows_P], v[rows_P] = m_P, v_P
            one, two = ((1 - b**steps_P).view(shape).to(g.dtype) for b in (b1, b2))
            lr_P = (scale * self.lr_S[rows_P]).view(shape).to(g.dtype)
            before = t[rows_P]
            if t.ndim > 2 and self.weight_decay:
                before = before * (1 - lr_P * self.weight_decay)
            t[rows_P] = before - lr_P * (m_P / one) / ((v_P / two).sqrt() + self.eps)

    def state(self) -> dict[str, Tensor]:
        """Counters and moments themselves, by name: written over, they are another moment's."""
        moments = {"first": self.first, "second": self.second}
        return {"steps": self.steps_S} | {f"{n}/{k}": t for n, all in moments.items() for k, t in enumerate(all)}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for t in self.tensors:
            t.grad = None

    def _clip(self, grads: Sequence[Tensor]) -> Tensor:
        squares = torch.stack([g.flatten(1).double().square().sum(1) for g in grads]).sum(0)
        if self.clip is None:
            return torch.ones_like(squares)
        return (self.clip / squares.sqrt().clamp(min=1e-12)).clamp(max=1.0)
