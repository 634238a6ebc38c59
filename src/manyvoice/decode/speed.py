"""How fast something runs, as a real-time factor, and the machine that a figure belongs to."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from manyvoice.errors import DecodeError


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Times of equal runs over the same audio.

    ``rtf = median compute seconds / audio seconds`` (smaller is faster) and ``rtfx = 1 / rtf`` (seconds of audio in
    one second of computing).

    Args: seconds: one time for each measured run, warm-up left out.  seconds_of_audio: what one run processes.
    """

    seconds: tuple[float, ...]
    seconds_of_audio: float

    @property
    def median(self) -> float:
        """Median compute time of a run in seconds."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Shortest compute time in seconds: the least disturbed by whatever else the machine did."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """(longest - shortest) / median; above about 0.2 the machine was busy and the figure is soft."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    @property
    def rtf(self) -> float:
        """Real-time factor: compute seconds for each second of audio."""
        return self.median / self.seconds_of_audio

    @property
    def rtfx(self) -> float:
        """Inverse real-time factor: seconds of audio for each compute second."""
        return self.seconds_of_audio / self.median

    def as_dict(self) -> dict[str, object]:
        """For JSON; times in seconds."""
        return {
            "rtf": self.rtf,
            "rtfx": self.rtfx,
            "median_seconds": self.median,
            "best_seconds": self.best,
            "spread": self.spread,
            "repeats": len(self.seconds),
            "seconds_of_audio": self.seconds_of_audio,
        }


def measure_speed(run: Callable[[], object], seconds_of_audio: float, *, warmup: int = 1, repeats: int = 5) -> Speed:
    """Call `run` `warmup` times unmeasured, then `repeats` times by the clock.

    The first calls pay for memory, kernels and caches, which no later call does. An accelerator works while Python
    has long gone on, so each reading of the clock waits until it has finished.

    Raises: DecodeError if there is no audio, no repeat, a negative warm-up, or a run too short for the clock.
    """
    if not seconds_of_audio > 0:
        raise DecodeError(
            f"seconds_of_audio = {seconds_of_audio}: a real-time factor divides by it, so it must be above 0; "
            "give the duration of the audio that one run processes"
        )
    if repeats < 1 or warmup < 0:
        raise DecodeError(
            f"repeats = {repeats}, warmup = {warmup}: at least 1 measured run and no negative warm-up; "
            "use repeats=5, warmup=1"
        )
    for _ in range(warmup):
        run()
    seconds = tuple(_timed(run) for _ in range(repeats))
    if min(seconds) <= 0:
        raise DecodeError("run: took no time that the clock can see; process more audio in one run")
    return Speed(seconds=seconds, seconds_of_audio=float(seconds_of_audio))


def _timed(run: Callable[[], object]) -> float:
    _wait_for_accelerator()
    start = time.perf_counter()
    run()
    _wait_for_accelerator()
    return time.perf_counter() - start


def _wait_for_accelerator() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def machine() -> dict[str, str | int | None]:
    """What a figure was measured on: stamped on every benchmark row, and free of host names and paths.

    ``cores`` are those this process may use, ``threads`` those of one torch operation, ``accelerator`` None on a
    machine without one.
    """
    return {
        "processor": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "accelerator": _accelerator(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    """The name that the maker gave it; Linux tells it in cpuinfo only, where Python does not look."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _accelerator() -> str | None:
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else str(device)
    return name if count == 1 else f"{count} x {name}"
