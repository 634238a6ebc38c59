"""Memory on a CPU: bytes of tensors alive at once, counted; and what the process really held, measured.

A CPU has no allocator that says how much it gave at most, and running until it fails would take the machine down. So
one step of one utterance and one of two are counted, and the rest follows: all but a constant grows with the batch.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_M_MMAP_THRESHOLD = -3  # malloc.h
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class _Alive(TorchDispatchMode):
    """Counts storages that operations return, until each is freed; what was there before does not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in before:
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        # torch keeps one Python object for a storage as long as the storage lives
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes()).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of new tensors alive at once while ``work`` runs, its backward pass included.

    Scratch that an operation keeps to itself is not seen; :func:`resident_peak` measures that.
    """
    with _Alive() as alive:
        work()
    return int(alive.peak)


def resident() -> int:
    """Bytes of this process in memory now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        # kilobytes on Linux, bytes on macOS; the most so far is the best that is known
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_peak(work: Callable[[], object]) -> int | None:
    """The most bytes of this process in memory while ``work`` runs; None where the system does not tell."""
    try:
        _CLEAR.write_text("5")  # resets the high-water mark
    except OSError:
        return None
    work()
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def release() -> None:
    """Give freed memory back to the system where the allocator can be told to, as glibc's can."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


@final
class Leftovers:
    """Called after each step: gives back what it left behind once that is more than a twentieth of the limit.

    A step is counted as it runs in a clean heap; without this 55 of an epoch's 89 batches went over their limit, the
    worst by 19 % (``benchmarks/results/batch_search.json``).

    Args: limit: bytes that the process may hold.
    """

    def __init__(self, limit: int) -> None:
        self._room = limit // 20
        self._clean: int | None = None

    def __call__(self) -> None:
        if self._clean is None or resident() > self._clean + self._room:
            release()
            self._clean = resident()


def large_blocks_apart() -> None:
    """Have glibc map blocks of 4 MiB and more one by one, so that they go back to the system when they are freed.

    Batches of ever new shapes otherwise leave a heap of holes. Left alone, glibc raises its threshold to 32 MiB by
    itself. At 1 MiB hardly a hole is left, but mapping then costs time.
    """
    option = _glibc("mallopt")
    if option is not None:
        option(_M_MMAP_THRESHOLD, 4 * 2**20)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def available() -> int:
    """Bytes that this process may still take: free memory, or what is left of its control group."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        held = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return free if most == "max" else min(free, int(most) - held)
    except (OSError, ValueError):
        return free
