"""The epoch plan: which utterances each step trains on, as a pure function of what is written down.

A step is a fixed number of micro-batches of like shape; rank r of W runs micro-batches r, r + W, ... of each. So the
plan knows nothing of ranks or workers, and a run resumes on any W that divides the micro-batches of a step.

    N  utterances
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from manyvoice.data.buckets import Bins
from manyvoice.data.neighbours import neighbourhoods
from manyvoice.errors import UsageError

Layout = Literal["bins", "neighbourhood"]
Step = list[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the order of a training run depends on.

    Args:
        corpus: fingerprint of the corpus.
        durations_N, tokens_N: seconds and label tokens of each utterance.
        bins, sizes: cells of the plane, and utterances in a micro-batch of each.
        accumulate: micro-batches of a step.
        seed: what shuffles.
        layout: micro-batches are of one cell, or of neighbours in the plane around places drawn in each epoch.
        tempo: factors by which augmentation speeds utterances up in an epoch, where it does.
    """

    corpus: str
    durations_N: np.ndarray = field(repr=False)
    tokens_N: np.ndarray = field(repr=False)
    bins: Bins
    sizes: tuple[int, ...]
    accumulate: int = 1
    seed: int = 0
    layout: Layout = "bins"
    tempo: Callable[[int], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise UsageError(f"batch.accumulate = {self.accumulate}: a step has at least one micro-batch; use 1")
        if len(self.sizes) != len(self.bins):
            raise UsageError(f"{len(self.sizes)} batch sizes for {len(self.bins)} bins; there must be one for each")

    def __len__(self) -> int:
        return len(self.durations_N)

    @cached_property
    def rooms(self) -> tuple[int, ...]:
        """Sizes under the rule that what fits of a larger shape fits of a smaller one."""
        edges, sizes = np.asarray(self.bins.cells), np.asarray(self.sizes)
        return tuple(int(sizes[(edges >= edge).all(1)].max()) for edge in edges)

    def cells(self, epoch: int = 0) -> np.ndarray:
        """Cell of each utterance in that epoch."""
        if self.tempo is None:
            return self._cells
        return self.bins.assign(self._seconds(epoch), self.tokens_N)

    def epoch(self, epoch: int) -> list[Step]:
        """Steps of that epoch; each a list of micro-batches; each an array of utterance indices.

        Every utterance comes exactly once. The last steps of a cell may have fewer micro-batches, and its last
        micro-batch fewer utterances.
        """
        rng = np.random.default_rng([self.seed, epoch])
        steps = self._from_cells(epoch, rng) if self.layout == "bins" else self._from_neighbours(epoch, rng)
        return [steps[i] for i in rng.permutation(len(steps))]

    def steps(self, epoch: int) -> int:
        """How many; the same in every epoch unless tempo or neighbours change from one to the next."""
        if self.layout == "bins" and self.tempo is None:
            return self._steps
        if epoch not in self._counted:
            self._counted[epoch] = len(self.epoch(epoch))
        return self._counted[epoch]

    def cell_of(self, micro: np.ndarray, epoch: int) -> int:
        """The cell whose batch size bounds a micro-batch."""
        seconds = self.durations_N[micro] if self.tempo is None else self.durations_N[micro] / self.tempo(epoch)[micro]
        longest, most = seconds.max(), self.tokens_N[micro].max()
        return int(self.bins.assign(np.asarray([longest]), np.asarray([most]))[0])

    def _from_cells(self, epoch: int, rng: np.random.Generator) -> list[Step]:
        cell_N = self.cells(epoch)
        shuffled = rng.permutation(len(cell_N))
        by_cell = shuffled[np.argsort(cell_N[shuffled], kind="stable")]
        ends = np.cumsum(np.bincount(cell_N, minlength=len(self.bins)))
        steps: list[Step] = []
        for members, size in zip(np.split(by_cell, ends[:-1]), self.rooms, strict=True):
            micro = [members[i : i + size] for i in range(0, len(members), size)]
            steps += self._grouped(micro)
        return steps

    def _from_neighbours(self, epoch: int, rng: np.random.Generator) -> list[Step]:
        rooms = np.asarray(self.rooms)

        def capacity(durations_K: np.ndarray, tokens_K: np.ndarray) -> np.ndarray:
            room_K: np.ndarray = rooms[self.bins.assign(durations_K, tokens_K)]
            return room_K

        return self._grouped(neighbourhoods(self._seconds(epoch), self.tokens_N, capacity, rng))

    def _grouped(self, micro: Sequence[np.ndarray]) -> list[Step]:
        return [list(micro[i : i + self.accumulate]) for i in range(0, len(micro), self.accumulate)]

    def _seconds(self, epoch: int) -> np.ndarray:
        return self.durations_N if self.tempo is None else self.durations_N / self.tempo(epoch)

    @cached_property
    def _cells(self) -> np.ndarray:
        return self.bins.assign(self.durations_N, self.tokens_N)

    @cached_property
    def _counted(self) -> dict[int, int]:
        return {}

    @cached_property
    def _steps(self) -> int:
        micro = -(-np.bincount(self._cells, minlength=len(self.bins)) // np.asarray(self.rooms))
        return int((-(-micro // self.accumulate)).sum())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that the order depends on; a checkpoint of another plan is refused.

        Tempo follows from the seed and from settings that a run's own fingerprint covers.
        """
        head = [self.corpus, list(self.bins.cells), list(self.sizes), self.accumulate, self.seed, self.layout]
        digest = hashlib.sha256(json.dumps(head).encode())
        digest.update(np.ascontiguousarray(self.durations_N, dtype=np.float64).tobytes())
        digest.update(np.ascontiguousarray(self.tokens_N, dtype=np.int64).tobytes())
        return digest.hexdigest()


def check_ranks(accumulate: int, ranks: int) -> None:
    """UsageError unless every rank gets the same number of micro-batches of a full step."""
    if accumulate % ranks:
        fit = [w for w in range(1, accumulate + 1) if accumulate % w == 0]
        raise UsageError(
            f"{ranks} ranks cannot share the {accumulate} micro-batches of a step equally; "
            f"start {' or '.join(map(str, fit))}, or set batch.accumulate to a multiple of {ranks}"
        )


def share(step: Step, rank: int, ranks: int) -> Step:
    """Micro-batches of a step that a rank runs; of a ragged last step some ranks may have none."""
    return step[rank::ranks]
