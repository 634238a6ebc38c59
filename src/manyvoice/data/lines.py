"""The lines of a large text file, indexed once and read one at a time.

N lines that are not blank
"""

from __future__ import annotations

import gzip
import os
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

    Several files are read as one, so that thousands of shards need one open file. ``quoted`` lets a line end stand
    inside double quotes, as CSV does. A ``.gz`` file, or several files, are unpacked into an unnamed temporary file,
    once per process that was not forked. Safe to fork, pickle and read from several threads: reads name their place,
    no position is shared.

    Raises: CorpusError if a file cannot be read, is damaged, or changes while in use.
    """

    def __init__(self, path: str | Path, *more: str | Path, quoted: bool = False):
        self._shown = [str(part) for part in (path, *more)]
        self.paths = tuple(Path(part).absolute() for part in (path, *more))
        self._unpacked: BinaryIO | None = None
        self._block: tuple[int, tuple[bytes, ...]] = (0, ())
        self._last = -2
        self._first_byte = np.zeros(1, dtype=np.int64)
        self._first_line = np.zeros(1, dtype=np.int64)
        try:
            with self._open() as file:
                self._stamp = self._stamp_of(file)
                self._starts_N1, self._numbers_N = _index(file, self._shown[0], quoted)
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read: {error}; check the path and the permissions") from error
        self._parts_N = np.searchsorted(self._first_byte, self._starts_N1[:-1], side="right").astype(np.int32) - 1

    def __len__(self) -> int:
        return len(self._numbers_N)

    def line(self, i: int) -> bytes:
        """The i-th line that is not blank, without its line end."""
        first, block = self._block
        if not first <= i < first + len(block):
            stop = min(len(self), i + (_AHEAD if i == self._last + 1 else 1))
            first, block = i, tuple(self._fetch(i, stop))
            self._block = (first, block)
        self._last = i
        return block[i - first]

    def part(self, i: int) -> int:
        """Which of the files the i-th line stands in."""
        return int(self._parts_N[i])

    def counts(self) -> list[int]:
        """Lines in each of the files."""
        return [int(n) for n in np.bincount(self._parts_N, minlength=len(self.paths))]

    def where(self, i: int) -> str:
        """File and line, counted from 1 as editors do, for a message."""
        part = self.part(i)
        return f"{self._shown[part]}:{int(self._numbers_N[i]) - int(self._first_line[part])}"

    def _fetch(self, start: int, stop: int) -> Iterator[bytes]:
        at = int(self._starts_N1[start])
        try:
            with self._open() as file:
                if self._stamp_of(file) != self._stamp:
                    raise CorpusError(f"{self._shown[0]}: has changed since it was opened; open the corpus again")
                data = os.pread(file.fileno(), int(self._starts_N1[stop]) - at, at)
        except OSError as error:
            raise CorpusError(f"{self._shown[0]}: cannot be read: {error}; restore the file") from error
        for k in range(start, stop):
            yield data[int(self._starts_N1[k]) - at : int(self._starts_N1[k + 1]) - at].strip(b"\r\n")

    def _open(self) -> BinaryIO:
        if len(self.paths) == 1 and self.paths[0].suffix != ".gz":
            return self.paths[0].open("rb", buffering=0)
        if self._unpacked is None:
            self._unpacked = self._unpack()
        return os.fdopen(os.dup(self._unpacked.fileno()), "rb", buffering=0)

    def _unpack(self) -> BinaryIO:
        target: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  closed by __del__
        first_byte, first_line, lines = [], [], 0
        try:
            for path, shown in zip(self.paths, self._shown, strict=True):
                first_byte.append(target.tell())
                first_line.append(lines)
                lines += _append(path, shown, target)
            target.flush()
        except BaseException:
            target.close()
            raise
        self._first_byte, self._first_line = np.asarray(first_byte), np.asarray(first_line)
        return target

    def _stamp_of(self, file: BinaryIO) -> tuple[int, int]:
        status = os.fstat(file.fileno())
        return status.st_size, 0 if self._unpacked else status.st_mtime_ns

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_unpacked": None, "_block": (0, ()), "_last": -2}

    def __del__(self) -> None:
        unpacked = self.__dict__.get("_unpacked")
        if unpacked is not None:
            unpacked.close()


def _append(path: Path, shown: str, target: BinaryIO) -> int:
    """Add a file, unpacked and ended with a line end; how many lines it has."""
    lines, end = 0, b"\n"
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as source:
            while block := source.read(_CHUNK):
                target.write(block)
                lines, end = lines + block.count(b"\n"), block[-1:]
                if target.tell() > _UNPACKED:
                    raise CorpusError(f"{shown}: unpacks to more than {_UNPACKED >> 30} GiB; unpack it yourself")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{shown}: is damaged as a gzip file: {error}; copy it again or unpack it") from error
    if end == b"\n":
        return lines
    target.write(b"\n")
    return lines + 1


def _index(file: BinaryIO, shown: str, quoted: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each line that is not blank starts, with the size of the file after the last; and the line's number."""
    file.seek(0)
    starts: list[NDArray[np.int64]] = []
    numbers: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    at, number, rest, more = 0, 1, b"", True
    while more:
        fresh = file.read(_CHUNK)
        more = bool(fresh)
        if not more and not rest:
            break
        chunk = rest + (fresh or b"\n")
        bytes_C = np.frombuffer(chunk, dtype=np.uint8)
        breaks = np.flatnonzero(bytes_C == 10)
        if not more:
            ends = np.asarray([len(breaks) - 1])  # whatever is left is one line, even inside a quote never closed
        elif quoted:
            ends = _outside_quotes(bytes_C, breaks)
        else:
            ends = np.arange(len(breaks))
        if len(ends):
            begin = np.concatenate([[0], breaks[ends[:-1]] + 1])
            used = int(breaks[ends[-1]]) + 1
            full = np.maximum.reduceat(bytes_C[:used], begin) > ord(" ")
            starts.append(at + begin[full])
            numbers.append(number + np.concatenate([[0], ends[:-1] + 1])[full])
            chunk, at, number = chunk[used:], at + used, number + int(ends[-1]) + 1
        rest = chunk
        if len(rest) > _LONGEST:
            raise CorpusError(
                f"{shown}:{number}: a line of more than {_LONGEST >> 20} MiB; rows must stand on lines of their own, "
                "and quotes must be closed"
            )
    size = os.fstat(file.fileno()).st_size
    return np.concatenate([*starts, [size]]).astype(np.int64), np.concatenate(numbers).astype(np.int64)


def _outside_quotes(bytes_C: NDArray[np.uint8], breaks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which line ends have an even number of double quotes before them."""
    quotes = np.flatnonzero(bytes_C == ord('"'))
    even: NDArray[np.int64] = np.flatnonzero(np.searchsorted(quotes, breaks) % 2 == 0)
    return even
