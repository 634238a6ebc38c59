"""Cells of the (duration, tokens) plane, and how many utterances a batch of each cell holds (arXiv:2503.05931).

An utterance of d seconds and u label tokens belongs to a cell whose two upper edges it does not pass, so no batch of
the cell is longer than its duration edge or has more label columns than its token edge: what fits at the edges fits.

    N  utterances
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from manyvoice.errors import UsageError
from manyvoice.types import Seconds

# Standard deviations above a bin's mean tokens per second; NeMo's estimator cuts there too.
OUTLIER = 4.0
NOWHERE = -1


@dataclass(frozen=True)
class Bins:
    """Upper edges (seconds, tokens) of each cell, ascending, every pair once.

    Cells of one duration edge form a duration bin; its tokens are cut into one or more cells.
    """

    cells: tuple[tuple[float, int], ...]

    def __post_init__(self) -> None:
        if not self.cells or any(a >= b for a, b in zip(self.cells, self.cells[1:], strict=False)):
            raise UsageError(f"bins {self.cells!r:.80}: must be (seconds, tokens) pairs in ascending order, each once")

    def __len__(self) -> int:
        return len(self.cells)

    @cached_property
    def edges(self) -> tuple[float, ...]:
        """Duration edges, ascending."""
        return tuple(dict.fromkeys(seconds for seconds, _ in self.cells))

    def assign(self, durations_N: np.ndarray, tokens_N: np.ndarray, *, strict: bool = False) -> np.ndarray:
        """Cell of each utterance, int64.

        Strict: the first duration edge that is long enough, and of its cells the first with room for the tokens;
        :data:`NOWHERE` where there is none. Lenient: those go to the first later cell with room in both, and pay
        with padding.

        Raises: UsageError if, lenient, an utterance has no cell at all.
        """
        cell_N = np.full(len(durations_N), NOWHERE, dtype=np.int64)
        first = np.cumsum([0, *self._cells_per_edge])
        tokens = np.asarray([t for _, t in self.cells])
        edge_N = np.searchsorted(np.asarray(self.edges), durations_N, side="left")
        order = np.argsort(edge_N, kind="stable")
        ends = np.searchsorted(edge_N[order], np.arange(len(self.edges) + 1))
        for e in range(len(self.edges)):
            members = order[ends[e] : ends[e + 1]]
            inside = np.searchsorted(tokens[first[e] : first[e + 1]], tokens_N[members], side="left")
            fits = inside < first[e + 1] - first[e]
            cell_N[members[fits]] = first[e] + inside[fits]
        if not strict:
            self._promote(cell_N, durations_N, tokens_N)
        return cell_N

    @cached_property
    def _cells_per_edge(self) -> list[int]:
        return [sum(s == edge for s, _ in self.cells) for edge in self.edges]

    def _promote(self, cell_N: np.ndarray, durations_N: np.ndarray, tokens_N: np.ndarray) -> None:
        """Give misfits the first cell that is large enough in both directions."""
        misfits = np.flatnonzero(cell_N == NOWHERE)
        for number, (seconds, most) in enumerate(self.cells):
            if not len(misfits):
                return
            fits = (durations_N[misfits] <= seconds) & (tokens_N[misfits] <= most)
            cell_N[misfits[fits]] = number
            misfits = misfits[~fits]
        if len(misfits):
            worst = misfits[np.argmax(durations_N[misfits])]
            most = max(t for _, t in self.cells)
            raise UsageError(
                f"the bins end at {self.edges[-1]:.3f} s and {most} tokens, but {len(misfits)} utterances have no room "
                f"in any, one of {float(durations_N[worst]):.3f} s with {int(tokens_N[worst])} tokens; estimate the "
                "bins from this corpus"
            )


def plane_bins(
    durations_N: np.ndarray, tokens_N: np.ndarray, bins: int, token_bins: int = 1, *, outlier: float = OUTLIER
) -> Bins:
    """Duration bins of about equal audio, each cut into cells of about equal tokens.

    Where many utterances have one length, edges coincide: k equal edges become one bin with k times the cells. The
    token edges of a bin are set without utterances whose tokens per second lie more than ``outlier`` standard
    deviations above the bin's mean, so that a few do not stretch it for all; they find room in a later cell, and a
    last cell of (longest, most tokens) has room for any.

    Raises: UsageError without utterances or for counts below one.
    """
    if len(durations_N) == 0:
        raise UsageError("bins need at least one utterance; the corpus is empty")
    if bins < 1 or token_bins < 1:
        raise UsageError(f"{bins} duration bins x {token_bins} token bins: there must be at least one of each")
    order = np.argsort(durations_N, kind="stable")
    seconds, tokens = np.asarray(durations_N, dtype=np.float64)[order], np.asarray(tokens_N, dtype=np.int64)[order]
    cells: set[tuple[float, int]] = set()
    start = 0
    for edge, times in _duration_edges(seconds, bins):
        stop = int(np.searchsorted(seconds, edge, side="right"))
        kept = _without_outliers(seconds[start:stop], tokens[start:stop], outlier)
        cells |= {(edge, t) for t in _token_edges(kept, token_bins * times)}
        start = stop
    if int(tokens.max()) > max(t for s, t in cells if s == float(seconds[-1])):
        cells.add((float(seconds[-1]), int(tokens.max())))
    return Bins(tuple(sorted(cells)))


def _duration_edges(seconds: np.ndarray, bins: int) -> list[tuple[float, int]]:
    """Ascending edges, each with how many of the equal shares end there; the last is the longest utterance."""
    cumulative = np.cumsum(seconds)
    places = np.searchsorted(cumulative, cumulative[-1] / bins * np.arange(1, bins), side="left")
    edges = [float(seconds[min(p, len(seconds) - 1)]) for p in places] + [float(seconds[-1])]
    return [(edge, edges.count(edge)) for edge in dict.fromkeys(edges)]


def _without_outliers(seconds: np.ndarray, tokens: np.ndarray, outlier: float) -> np.ndarray:
    rate = tokens / np.maximum(seconds, 1e-9)
    spread = float(rate.std())
    # where all speak equally fast nobody is an outlier
    return tokens if spread == 0.0 else tokens[rate <= rate.mean() + outlier * spread]


def _token_edges(tokens: np.ndarray, parts: int) -> list[int]:
    ordered = np.sort(tokens)
    cumulative = np.cumsum(ordered)
    places = np.searchsorted(cumulative, cumulative[-1] / parts * np.arange(1, parts), side="left")
    return sorted({*(int(ordered[p]) for p in places), int(ordered[-1])})


def sizes_for(bins: Bins, seconds: Seconds) -> tuple[int, ...]:
    """Utterances in a batch of each cell so that it holds at most ``seconds`` of padded audio, and at least one."""
    return tuple(max(1, int(seconds / edge)) for edge, _ in bins.cells)


def seconds_for_updates(
    bins: Bins, counts: Sequence[int] | np.ndarray, updates: int, *, accumulate: int = 1
) -> Seconds | None:
    """The most padded audio a micro-batch may hold while an epoch still has that many updates.

    Larger batches are not free: they make fewer updates. None where even single utterances make too few.
    """

    def steps(seconds: float) -> int:
        micro = -(-np.asarray(counts) // np.asarray(sizes_for(bins, Seconds(seconds))))
        return int((-(-micro // accumulate)).sum())

    low, high = bins.edges[0], sum(n * s for n, (s, _) in zip(counts, bins.cells, strict=True)) + bins.edges[-1]
    if steps(low) < updates:
        return None
    while high - low > 1e-3 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if steps(middle) >= updates else (low, middle)
    return Seconds(low)
