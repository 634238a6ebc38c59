"""Long recordings cut at pauses, so that no piece is longer than the recogniser was made for.

N  samples
"""

from __future__ import annotations

import numpy as np

from manyvoice.types import Seconds

# Loudness is measured over windows of 200 ms (a pause between words is longer) that start every 10 ms.
_WINDOW = Seconds(0.2)
_HOP = Seconds(0.01)


def cut_at_pauses(samples_N: np.ndarray, rate: int, longest: Seconds) -> list[tuple[int, int]]:
    """(start, stop) in samples of consecutive pieces that together are the whole, none longer than ``longest``.

    While more than ``longest`` is left, the cut lies in the middle of the quietest 200 ms of its second half.
    """
    limit = max(1, round(longest * rate))
    pieces, start = [], 0
    while len(samples_N) - start > limit:
        stop = start + _quietest(samples_N[start : start + limit], rate)
        pieces.append((start, stop))
        start = stop
    return [*pieces, (start, len(samples_N))]


def _quietest(samples_N: np.ndarray, rate: int) -> int:
    """Where to cut, behind the middle; always at least one sample in."""
    window, hop = max(1, round(_WINDOW * rate)), max(1, round(_HOP * rate))
    power = np.concatenate([[0.0], np.cumsum(np.square(samples_N, dtype=np.float64))])
    starts = np.arange(len(samples_N) // 2, len(samples_N) - window, hop)
    if len(starts) == 0:
        return len(samples_N)
    loudness = power[starts + window] - power[starts]
    return int(starts[int(np.argmin(loudness))]) + window // 2
