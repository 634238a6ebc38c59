"""What a run says while it works: JSON lines that a resumed run continues, TensorBoard, padding and speed."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import torch

from manyvoice.data.padding import Waste
from manyvoice.errors import CheckpointError

# Names of the log that differ between two equal runs; everything else is the same to the last bit.
TIMINGS = frozenset({"seconds", "audio_per_second", "memory_mib"})


@final
class MetricsLog:
    """``metrics.jsonl``: a line a step, flushed, and cut back to the checkpoint when a run resumes.

    Args: folder: of the run.  resume_at: lines of later steps are dropped.  tensorboard: also write events there.
    """

    def __init__(self, folder: Path, *, resume_at: int = 0, tensorboard: bool = True) -> None:
        self.path = folder / "metrics.jsonl"
        try:
            kept = [line for line in read_metrics(folder) if line["step"] <= resume_at]
            aside = self.path.with_suffix(".tmp")
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(aside, self.path)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written ({error}); free space or choose another output"
            ) from error
        self._events = _tensorboard(folder, resume_at) if tensorboard else None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """One line; it has a ``step``. CheckpointError if the disk is full."""
        try:
            self._file.write(json.dumps(line) + "\n")
            if self._events is not None:
                for name, value in line.items():
                    if name != "step" and isinstance(value, int | float):
                        self._events.add_scalar(name, value, line["step"])
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written ({error}); free space, then run the same command again to resume"
            ) from error

    def close(self) -> None:
        """Finish both files."""
        # every line was written through; what a full disk has refused is refused again here
        with suppress(OSError):
            self._file.close()
        if self._events is not None:
            with suppress(OSError):
                self._events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``; a last line that a crash cut off is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _tensorboard(folder: Path, purge: int) -> Any:
    """A writer of events, or None where the extra ``track`` is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except (ImportError, OSError):
        return None
    return SummaryWriter(str(folder / "events"), purge_step=purge + 1)


def peak_memory() -> float:
    """MiB at most so far: of the accelerator's allocator, or of this process on a CPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@final
class Pace:
    """Speed, padding and time left, from the log lines of steps.

    Args: epochs: of the whole run.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self._last = time.perf_counter()
        self._smooth: float | None = None
        self._first: tuple[float, float] | None = None

    def line(self, log: Mapping[str, float]) -> dict[str, float]:
        """The log line with padding of frames and of label tokens, ``seconds`` of the step and audio per second."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        speed = log["audio_seconds"] / took if took > 0 else 0.0
        self._smooth = speed if self._smooth is None else 0.9 * self._smooth + 0.1 * speed
        if self._first is None:
            self._first = (now, log["epoch"])
        waste = Waste().plus(log)
        return {
            **log,
            "padding": waste.frame_padding,
            "token_padding": waste.token_padding,
            "seconds": took,
            "audio_per_second": self._smooth,
            "memory_mib": peak_memory(),
        }

    def left(self, epoch: float) -> float | None:
        """Seconds to the end at the pace so far; None at the beginning."""
        if self._first is None or epoch <= self._first[1]:
            return None
        rate = (time.perf_counter() - self._first[0]) / (epoch - self._first[1])
        return rate * (self.epochs - epoch)

    def restart(self) -> None:
        """Forget the pace so far: the steps that come are of another kind."""
        self._first = None

    def pause(self) -> None:
        """Forget the time since the last step: it went to evaluation or a checkpoint."""
        self._last = time.perf_counter()
