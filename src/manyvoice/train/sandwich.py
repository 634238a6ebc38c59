"""A supernet's passes over a micro-batch: a step's first subnet on the labels, the others also on its answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, Protocol, final

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from manyvoice.elastic.distill import DIVERGENCES, frames_distilled
from manyvoice.elastic.front import front_once
from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.sampling import Drawn
from manyvoice.elastic.still import held_still, outside
from manyvoice.elastic.subnet import Subnet
from manyvoice.models import batchnorm
from manyvoice.train.flatstart import flat_ctc_of, said
from manyvoice.train.objective import Loss, ctc_of, ctc_per_utterance, scores_of
from manyvoice.types import Batch

Distillation = Literal["alpha", "kl", "none"]


class Sampler(Protocol):
    """Says which subnets a step trains, the teacher first; the same on every rank and after a resume."""

    @property
    def sizes(self) -> Sequence[Subnet]: ...

    def draw(self, step: int) -> list[Drawn]: ...


@final
class SupernetPasses:
    """CTC on the first subnet of the step; weight x w (hard x CTC + (1 - hard) x divergence from it) on the others.

    TODM (arXiv:2309.01947) after AlphaNet (arXiv:2102.07954). Each pass is back-propagated before the next begins, and
    inside its own narrowing, so memory is that of the largest alone. The divergence is summed over frames. w is how
    much of an utterance's labels the teacher says (:func:`manyvoice.train.flatstart.said`), 1 without distillation:
    while the largest is on its plateau the others wait, which costs nothing. The norms' running statistics are the
    largest's, or the smallest's while that trains alone.

    Args:
        distill: adaptive alpha-divergence, plain KL, or none: then the labels alone.
        hard: share of the labels in what the others learn from.
        weight: of each of the others' losses beside the first's.
        dropout: rates follow the kept width.
        flat_start: the first subnet's CTC has one.
    """

    def __init__(
        self,
        elastic: Elastic,
        sampler: Sampler,
        *,
        distill: Distillation,
        hard: float,
        dropout: bool,
        weight: float = 1.0,
        flat_start: bool = True,
    ) -> None:
        self.elastic, self.sampler, self.dropout = elastic, sampler, dropout
        self.ctc = flat_ctc_of if flat_start else ctc_of
        self.divergence = DIVERGENCES.get(distill)
        self.weight = weight
        self.hard = hard if self.divergence is not None else 1.0
        self.blank = elastic.family.blank(elastic.model)

    def __call__(self, model: PreTrainedModel, batch: Batch, step: int) -> Generator[Loss, None, None]:
        """A loss for each subnet of the step, and one more that back-propagates the front end, which they share."""
        with front_once(model, self.elastic.anatomy) as front:
            yield from self._of_subnets(model, batch, step)
            if front is not None and (rest := front.rest()) is not None:
                yield Loss(rest, batch.token_len_B.sum())

    def _of_subnets(self, model: PreTrainedModel, batch: Batch, step: int) -> Generator[Loss, None, None]:
        first, *others = self.sampler.draw(step)
        with self._at(first, recorded=first.role != "other"):
            scores = scores_of(model, batch)
            loss = self.ctc(scores, batch, self.blank)
            teacher_BTV, mask_BT = scores.x.detach(), scores.mask_BT()
            share_B = torch.ones_like(batch.token_len_B, dtype=torch.float32)
            if self.divergence is not None:
                share_B = said(teacher_BTV, mask_BT, self.blank, batch.token_len_B)
            del scores
            loss.counts["loss_subnets"] = 0.0
            yield loss
        del loss
        if not share_B.any():
            return
        told = 0.0
        for drawn in others:
            with self._at(drawn):
                scores = scores_of(model, batch)
                loss_B = scores.x.new_zeros(len(batch), dtype=torch.promote_types(scores.x.dtype, torch.float32))
                if self.hard:
                    loss_B = self.hard * ctc_per_utterance(scores, batch.tokens_BU, batch.token_len_B, self.blank)
                if self.divergence is not None and self.hard < 1:
                    far_B = frames_distilled(self.divergence, teacher_BTV, scores.x, mask_BT)
                    loss_B = loss_B + (1 - self.hard) * far_B
                total = (share_B * loss_B).sum()
                told += float(total.detach()) / len(others)
                del scores
                yield Loss(self.weight * total, batch.token_len_B.sum(), {"loss_subnets": told})

    def heaviest(self) -> int:
        """A step that takes as much memory as any: one that has the largest."""
        return next(step for step in itertools.count() if any(d.role == "largest" for d in self.sampler.draw(step)))

    def around_update(self, optimizer: Optimizer) -> Callable[[int], AbstractContextManager[object]]:
        """Holds still, while the optimiser steps, what is outside of the step's subnets."""
        masks: dict[frozenset[frozenset[str]], dict[str, torch.Tensor]] = {}

        def around(step: int) -> AbstractContextManager[object]:
            drawn = self.sampler.draw(step)
            if any(d.role == "largest" for d in drawn):
                return nullcontext()
            key = frozenset(d.subnet.kept for d in drawn)
            if key not in masks:
                masks[key] = outside(self.elastic, [d.subnet for d in drawn])
            return held_still(optimizer, self.elastic, masks[key])

        return around

    def grown_from(self, step: int) -> Subnet | None:
        """The smallest, in a step that trains it alone; None in any other."""
        first, *others = self.sampler.draw(step)
        return first.subnet if first.role == "smallest" and not others else None

    @contextmanager
    def _at(self, drawn: Drawn, *, recorded: bool = False) -> Iterator[None]:
        if drawn.role == "largest":
            yield
            return
        left = nullcontext() if recorded else batchnorm.unrecorded(self.elastic.model)
        with left, self.elastic.at(drawn.subnet, dropout=self.dropout):
            yield
