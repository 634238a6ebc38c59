"""Bins of the duration axis, and how many utterances a batch of each bin holds.

N  utterances
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from manyvoice.errors import UsageError
from manyvoice.types import Seconds


@dataclass(frozen=True)
class Bins:
    """Upper edges in seconds, ascending; the last one is the longest utterance."""

    edges: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.edges)

    def assign(self, durations_N: np.ndarray) -> np.ndarray:
        """Bin of each utterance: the first whose edge is not below its duration."""
        bins: np.ndarray = np.searchsorted(np.asarray(self.edges), durations_N, side="left")
        if len(durations_N) and bins.max() >= len(self.edges):
            longest = float(durations_N.max())
            raise UsageError(
                f"the bins end at {self.edges[-1]:.3f} s but an utterance lasts {longest:.3f} s; "
                "estimate the bins from this corpus"
            )
        return bins


def duration_bins(durations_N: np.ndarray, bins: int) -> Bins:
    """Edges that give every bin about the same total duration (lhotse's rule, arXiv:2503.05931 section 2).

    Equal edges, which many utterances of one length would give, are merged, so there may be fewer bins.
    """
    if len(durations_N) == 0:
        raise UsageError("bins need at least one utterance; the corpus is empty")
    ordered = np.sort(np.asarray(durations_N, dtype=np.float64))
    share = ordered.sum() / bins
    cumulative = np.cumsum(ordered)
    places = np.searchsorted(cumulative, share * np.arange(1, bins), side="left")
    edges = [float(ordered[min(p, len(ordered) - 1)]) for p in places]
    return Bins(tuple(sorted({*edges, float(ordered[-1])})))


def sizes_for(bins: Bins, seconds: Seconds) -> tuple[int, ...]:
    """Utterances in a batch of each bin so that it holds at most ``seconds`` of padded audio, and at least one."""
    return tuple(max(1, int(seconds / edge)) for edge in bins.edges)
