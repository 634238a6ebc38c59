"""The epoch plan: which utterances each step trains on, as a pure function of what is written down.

A step is a fixed number of micro-batches of one bin; rank r of W runs micro-batches r, r + W, ... of each. So the
plan knows nothing of ranks or workers, and a run resumes on any W that divides the micro-batches of a step.

    N  utterances
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from manyvoice.data.buckets import Bins
from manyvoice.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the order of a training run depends on.

    Args:
        corpus: fingerprint of the corpus.
        bin_N: bin of each utterance.
        bins, sizes: edges in seconds, and utterances in a micro-batch of each bin.
        accumulate: micro-batches of a step.
        seed: what shuffles.
    """

    corpus: str
    bin_N: np.ndarray = field(repr=False)
    bins: Bins
    sizes: tuple[int, ...]
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise UsageError(f"batch.accumulate = {self.accumulate}: a step has at least one micro-batch; use 1")
        if len(self.sizes) != len(self.bins):
            raise UsageError(f"{len(self.sizes)} batch sizes for {len(self.bins)} bins; there must be one for each")

    @cached_property
    def steps_per_epoch(self) -> int:
        """The same in every epoch: it depends on the counts in the bins only."""
        counts = np.bincount(self.bin_N, minlength=len(self.bins))
        micro = -(-counts // np.asarray(self.sizes))
        return int((-(-micro // self.accumulate)).sum())

    def epoch(self, epoch: int) -> list[list[np.ndarray]]:
        """Steps of that epoch; each a list of micro-batches; each an array of utterance indices.

        Every utterance comes exactly once. The last step of a bin may have fewer micro-batches, and its last
        micro-batch fewer utterances.
        """
        rng = np.random.default_rng([self.seed, epoch])
        steps: list[list[np.ndarray]] = []
        for b, size in enumerate(self.sizes):
            members = np.flatnonzero(self.bin_N == b)
            rng.shuffle(members)
            micro = [members[i : i + size] for i in range(0, len(members), size)]
            steps += [micro[i : i + self.accumulate] for i in range(0, len(micro), self.accumulate)]
        order = rng.permutation(len(steps))
        return [steps[i] for i in order]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that the order depends on; a checkpoint of another plan is refused."""
        head = [self.corpus, list(self.bins.edges), list(self.sizes), self.accumulate, self.seed]
        digest = hashlib.sha256(json.dumps(head).encode())
        digest.update(np.ascontiguousarray(self.bin_N, dtype=np.int64).tobytes())
        return digest.hexdigest()


def check_ranks(accumulate: int, ranks: int) -> None:
    """UsageError unless every rank gets the same number of micro-batches of a full step."""
    if accumulate % ranks:
        fit = [w for w in range(1, accumulate + 1) if accumulate % w == 0]
        raise UsageError(
            f"{ranks} ranks cannot share the {accumulate} micro-batches of a step equally; "
            f"start {' or '.join(map(str, fit))}, or set batch.accumulate to a multiple of {ranks}"
        )


def share(step: list[np.ndarray], rank: int, ranks: int) -> list[tuple[np.ndarray, bool]]:
    """Micro-batches of a step that a rank runs, each with whether it counts.

    Every rank gets the same number: where a ragged last step has too few, the rank repeats its first one (or the
    step's) with weight nothing, because all ranks must take part in the exchange of gradients.
    """
    mine = step[rank::ranks]
    rounds = -(-len(step) // ranks)
    filler = mine[0] if mine else step[0]
    return [(m, True) for m in mine] + [(filler, False)] * (rounds - len(mine))
