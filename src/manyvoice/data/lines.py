"""The lines of a large text file, indexed once and read one at a time.

    N lines that are not blank
"""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, final

import numpy as np
from numpy.typing import NDArray

from manyvoice.errors import CorpusError

_CHUNK: Final = 8 << 20
_LONGEST: Final = 64 << 20  # a row this long is no row: the file has no line ends or a quote is never closed
_AHEAD: Final = 256  # rows fetched together while reading in order
_UNPACKED: Final = 64 << 30  # no manifest is larger; a compression bomb is


@final
class LineFile:
    """Random access to the lines of a text file, plain or ``.gz``; in memory are only their places.

    ``quoted`` lets a line end stand inside double quotes, as CSV does. A ``.gz`` file is unpacked into an unnamed
    temporary file, once per process that was not forked. Safe to fork, pickle and read from several threads: reads
    name their place, no position is shared.

    Raises: CorpusError if the file cannot be read, is damaged, or changes while in use.
    """

    def __init__(self, path: str | Path, *, quoted: bool = False):
        self.path = Path(path).absolute()
        self.shown = str(path)
        self._unpacked: BinaryIO | None = None
        self._block: tuple[int, tuple[bytes, ...]] = (0, ())
        self._last = -2
        try:
            with self._open() as file:
                self._stamp = self._stamp_of(file)
                self._starts_N1, self._numbers_N = _index(file, self.shown, quoted)
        except OSError as error:
            raise CorpusError(f"{self.shown}: cannot be read: {error}; check the path and the permissions") from error

    def __len__(self) -> int:
        return len(self._numbers_N)

    def line(self, i: int) -> bytes:
        """The i-th line that is not blank, without its line end."""
        first, block = self._block
        if first <= i < first + len(block):
            self._last = i
            return block[i - first]
        stop = min(len(self), i + (_AHEAD if i == self._last + 1 else 1))
        lines = tuple(self._fetch(i, stop))
        self._last = i
        self._block = (i, lines)
        return lines[0]

    def number(self, i: int) -> int:
        """The number of the i-th line in the file, counted from 1 as editors do."""
        return int(self._numbers_N[i])

    def where(self, i: int) -> str:
        """File and line, for a message."""
        return f"{self.shown}:{self.number(i)}"

    def _fetch(self, start: int, stop: int) -> Iterator[bytes]:
        at = int(self._starts_N1[start])
        try:
            with self._open() as file:
                if self._stamp_of(file) != self._stamp:
                    raise CorpusError(f"{self.shown}: has changed since it was opened; open the corpus again")
                data = os.pread(file.fileno(), int(self._starts_N1[stop]) - at, at)
        except OSError as error:
            raise CorpusError(f"{self.shown}: cannot be read: {error}; restore the file") from error
        for k in range(start, stop):
            yield data[int(self._starts_N1[k]) - at : int(self._starts_N1[k + 1]) - at].strip(b"\r\n")

    def _open(self) -> BinaryIO:
        if self.path.suffix != ".gz":
            return self.path.open("rb", buffering=0)
        if self._unpacked is None:
            self._unpacked = _unpack(self.path, self.shown)
        return os.fdopen(os.dup(self._unpacked.fileno()), "rb", buffering=0)

    def _stamp_of(self, file: BinaryIO) -> tuple[int, int]:
        status = os.fstat(file.fileno())
        return status.st_size, 0 if self._unpacked else status.st_mtime_ns

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_unpacked": None, "_block": (0, ()), "_last": -2}

    def __del__(self) -> None:
        unpacked = self.__dict__.get("_unpacked")
        if unpacked is not None:
            unpacked.close()


def _unpack(path: Path, shown: str) -> BinaryIO:
    target: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  closed by its owner
    try:
        with gzip.open(path, "rb") as packed:
            while block := packed.read(_CHUNK):
                target.write(block)
                if target.tell() > _UNPACKED:
                    raise CorpusError(f"{shown}: unpacks to more than {_UNPACKED >> 30} GiB; unpack it yourself")
        target.flush()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        target.close()
        raise CorpusError(f"{shown}: is damaged as a gzip file: {error}; copy it again or unpack it") from error
    except (OSError, CorpusError):
        target.close()
        raise
    return target


def _index(file: BinaryIO, shown: str, quoted: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each line that is not blank starts (one more for the end), and its number."""
    file.seek(0)
    starts: list[NDArray[np.int64]] = []
    numbers: list[NDArray[np.int64]] = []
    at, number, rest, last = 0, 1, b"", False
    while not last:
        fresh = file.read(_CHUNK)
        last = not fresh
        chunk = rest + fresh + (b"\n" if last and rest else b"")
        bytes_C = np.frombuffer(chunk, dtype=np.uint8)
        breaks = np.flatnonzero(bytes_C == 10)
        ends = _outside_quotes(bytes_C, breaks) if quoted and not (last and rest) else np.arange(len(breaks))
        if last and rest:
            ends = np.asarray([len(breaks) - 1])
        if len(ends) == 0:
            _check_longest(chunk, shown, number)
            rest = chunk
            continue
        begin = np.concatenate([[0], breaks[ends[:-1]] + 1])
        first_line = number + np.concatenate([[0], ends[:-1] + 1])
        full = np.maximum.reduceat(bytes_C, begin) > 32
        starts.append((at + begin[full]).astype(np.int64))
        numbers.append(first_line[full].astype(np.int64))
        used = int(breaks[ends[-1]]) + 1
        rest, at, number = chunk[used:], at + used, number + int(ends[-1]) + 1
    starts.append(np.asarray([at - 1 if rest else at], dtype=np.int64))
    return np.concatenate(starts), np.concatenate(numbers) if numbers else np.zeros(0, dtype=np.int64)
