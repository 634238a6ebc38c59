"""How many utterances run at once, lowered when a step runs out of memory; the plan's steps stay what they are.

A step keeps its utterances whatever the limits, only its micro-batches are cut smaller. So the order of the epoch, the
number of updates and the place in it do not change, and a run resumes on a machine with less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from accelerate import Accelerator

from manyvoice.errors import WorkError
from manyvoice.train.distributed import any_rank, smallest
from manyvoice.types import Batch

_NONE = 2**31


@final
@dataclass(frozen=True, kw_only=True)
class Overflow:
    """A micro-batch that did not fit into memory."""

    cell: int
    utterances: int
    frames: int
    tokens: int
    ids: tuple[str, ...]

    @classmethod
    def of(cls, batch: Batch) -> Overflow:
        """Of the batch that was tried."""
        return cls(
            cell=batch.cell,
            utterances=len(batch),
            frames=batch.features_BTF.shape[1],
            tokens=batch.tokens_BU.shape[1],
            ids=batch.ids,
        )

    def text(self) -> str:
        """In words."""
        return f"{self.utterances} utterances of up to {self.frames / 100:.1f} s and {self.tokens} tokens"


@final
@dataclass(frozen=True, kw_only=True)
class Version:
    """From this step on, at most so many utterances of the cell run at once.

    Args: batch: what overflowed, where this rank saw it.
    """

    from_step: int
    cell: int
    size: int
    batch: str = ""


@final
class Limits:
    """Versions of the plan so far.

    Args: tell: told of each new version, on every rank.
    """

    def __init__(self, tell: Callable[[Version], None] = lambda version: None) -> None:
        self.tell = tell
        self.versions: list[Version] = []

    def of(self, cell: int) -> int | None:
        """The limit of a cell; None where the plan's own size stands."""
        sizes = [v.size for v in self.versions if v.cell == cell]
        return min(sizes, default=None)

    def pieces(self, batch: Batch) -> Iterator[Batch]:
        """The batch in equal parts within its limit."""
        limit = self.of(batch.cell)
        parts = 1 if limit is None else -(-len(batch) // limit)
        edges = [round(i * len(batch) / parts) for i in range(parts + 1)]
        for start, stop in zip(edges, edges[1:], strict=False):
            yield batch.rows(start, stop)

    def agree(self, accelerator: Accelerator, overflow: Overflow | None, step: int) -> bool:
        """Whether any rank overflowed; if so the cells' limits are lowered on all, and the step must begin again.

        Raises: WorkError where a single utterance does not fit.
        """
        if not any_rank(accelerator, overflow is not None):
            return False
        # cells that overflowed anywhere, each with half of what was too much; all ranks must learn of all of them
        wanted = torch.full((self._cells(accelerator, overflow),), _NONE, dtype=torch.int64)
        if overflow is not None:
            wanted[overflow.cell + 1] = overflow.utterances // 2
        lowered = smallest(accelerator, wanted)
        for place in torch.nonzero(lowered < _NONE).flatten().tolist():
            cell, size = place - 1, int(lowered[place])
            seen = overflow.text() if overflow is not None and overflow.cell == cell else ""
            if size == 0:
                what = seen or "an utterance on another rank"
                raise WorkError(
                    f"step {step} ran out of memory on {what}, which cannot be cut further; free memory, leave out "
                    "the longest utterances, set train.activation_checkpointing=true, or take a smaller model"
                )
            version = Version(from_step=step, cell=cell, size=size, batch=seen)
            self.versions.append(version)
            self.tell(version)
        return True

    @staticmethod
    def _cells(accelerator: Accelerator, overflow: Overflow | None) -> int:
        """Length of a vector with a place for every cell that overflowed anywhere, and one for no cell."""
        here = -(2 + (overflow.cell if overflow is not None else -1))
        return -int(smallest(accelerator, torch.tensor([here]))[0])

    def state(self) -> list[dict[str, Any]]:
        """As a checkpoint keeps it."""
        return [asdict(v) for v in self.versions]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Versions as a checkpoint kept them."""
        self.versions = [Version(**v) for v in state]
