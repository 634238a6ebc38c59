"""What padding costs, counted on the tensors a model was given: frames and label tokens apart, by cell of the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from manyvoice.types import Batch


def padding_of(batch: Batch) -> dict[str, float]:
    """Counts of one batch: utterances, real seconds, real and padded frames and tokens."""
    return {
        "utterances": float(len(batch)),
        "audio_seconds": float(batch.seconds_B.sum()),
        "frames": float(batch.len_B.sum()),
        "padded_frames": float(batch.features_BTF.shape[0] * batch.features_BTF.shape[1]),
        "label_tokens": float(batch.token_len_B.sum()),
        "padded_tokens": float(batch.tokens_BU.numel()),
    }


@final
@dataclass(frozen=True, kw_only=True)
class Waste:
    """Totals of some steps. Padding is 1 - real / padded.

    Args: seconds: that the steps took.
    """

    steps: int = 0
    utterances: float = 0.0
    audio_seconds: float = 0.0
    frames: float = 0.0
    padded_frames: float = 0.0
    label_tokens: float = 0.0
    padded_tokens: float = 0.0
    seconds: float = 0.0

    @property
    def frame_padding(self) -> float:
        """Share of the frames that were no speech."""
        return 1.0 - self.frames / self.padded_frames if self.padded_frames else 0.0

    @property
    def token_padding(self) -> float:
        """Share of the label columns that were no label."""
        return 1.0 - self.label_tokens / self.padded_tokens if self.padded_tokens else 0.0

    def plus(self, line: Mapping[str, Any]) -> Waste:
        """With one more step, as it stands in a run's ``metrics.jsonl``."""
        names = [n for n in self.__dataclass_fields__ if n != "steps"]
        sums = {n: getattr(self, n) + float(line.get(n, 0.0)) for n in names}
        return Waste(steps=self.steps + 1, **sums)


@final
class PaddingMeter:
    """Waste by epoch and cell, from the log lines of steps; a resumed run's lines are as good as its own."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self._found: dict[tuple[int, int], Waste] = {}
        for line in lines:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """One step; ``epoch`` counts passes after it, ``cell`` is -1 where its micro-batches are of several."""
        # the last step of an epoch ends at the whole number: it belongs to the epoch before
        key = (max(0, -int(-float(line["epoch"]) // 1) - 1), int(line.get("cell", -1)))
        self._found[key] = self._found.get(key, Waste()).plus(line)

    def total(self, epoch: int | None = None) -> Waste:
        """Of one epoch, or of all."""
        return _sum(w for (e, _), w in self._found.items() if epoch in (None, e))

    def by_cell(self, epoch: int | None = None) -> dict[int, Waste]:
        """Of each cell, ascending."""
        cells = sorted({c for _, c in self._found})
        found = {c: _sum(w for (e, k), w in self._found.items() if k == c and epoch in (None, e)) for c in cells}
        return {c: w for c, w in found.items() if w.steps}

    def epochs(self) -> list[int]:
        """Those that were seen, ascending."""
        return sorted({e for e, _ in self._found})


def careless_padding(durations_N: np.ndarray, utterances: float, seed: int = 0) -> float:
    """Share of padded frames if batches of so many utterances on average were drawn at random."""
    order = np.random.default_rng(seed).permutation(len(durations_N))
    batches = np.array_split(durations_N[order], max(1, round(len(durations_N) / utterances)))
    return 1.0 - float(durations_N.sum()) / float(sum(len(b) * b.max() for b in batches))


def _sum(parts: Iterable[Waste]) -> Waste:
    total = Waste()
    for part in parts:
        total = Waste(**{n: getattr(total, n) + getattr(part, n) for n in part.__dataclass_fields__})
    return total
