"""Rows of unequal length on disk: decoded audio (int16) or features (float16) in one memory-mapped file.

    folder/index.json   format, key, dtype, width, lengths of the rows, size and SHA-256 of the data, SHA-256 of itself
    folder/data.bin     the rows one after the other, little-endian, row-major

Nothing in it can run code when it is loaded.

    N rows   T frames or samples   F features
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, BinaryIO, Final, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from manyvoice.errors import CorpusError

FORMAT: Final = "manyvoice.cache.v1"
_DTYPES: Final = ("int16", "float16", "float32")
_INDEX, _DATA = "index.json", "data.bin"
_BLOCK: Final = 1 << 24


def user_cache(kind: str) -> Path:
    """A folder for what can be made again: ``$MANYVOICE_CACHE/KIND``, or one in the user's cache folder."""
    named = os.environ.get("MANYVOICE_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manyvoice"
    return base / kind


@final
class RaggedCache:
    """Rows by number; made by `build`, opened by `open`. Safe to fork and to pickle.

    ``key`` says what the rows were made from (fingerprint of the corpus) and how (settings); a cache with another key
    is refused, so stale rows are never used.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any]):
        self.folder = folder
        self.dtype: np.dtype[Any] = np.dtype(index["dtype"])
        self.width = int(index["width"])
        self._sha256 = str(index["data_sha256"])
        self._ends_N = np.cumsum(np.asarray(index["lengths"], dtype=np.int64))
        self._data: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self._ends_N)

    def __getitem__(self, i: int) -> NDArray[Any]:
        """Row i: T, or T F where the width is not 0; a copy."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of a cache of {len(self)}")
        i %= len(self)
        start, end = int(self._ends_N[i - 1]) if i else 0, int(self._ends_N[i])
        if start == end:
            return np.zeros((0, self.width) if self.width else 0, dtype=self.dtype)
        if self._data is None:
            shape = (int(self._ends_N[-1]), self.width) if self.width else (int(self._ends_N[-1]),)
            self._data = np.memmap(self.folder / _DATA, dtype=self.dtype, mode="r", shape=shape)
        return np.array(self._data[start:end])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    def verify(self) -> None:
        """Read all data and compare it with its hash; `open` compares sizes only. Raises: CorpusError."""
        digest = hashlib.sha256()
        with (self.folder / _DATA).open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        if digest.hexdigest() != self._sha256:
            raise CorpusError(f"{self.folder}: the data of this cache is damaged; {_AGAIN}")

    @classmethod
    def exists(cls, folder: str | Path, key: str) -> bool:
        """Whether there is a cache with this key; a damaged or foreign one is not."""
        try:
            cls.open(folder, key)
        except CorpusError:
            return False
        return True

    @classmethod
    def build(
        cls, folder: str | Path, key: str, rows: Iterable[NDArray[Any]], dtype: DTypeLike, width: int = 0
    ) -> RaggedCache:
        """Write all rows aside, then move the folder to its place: it is complete or not there.

        If others made the same in the meantime, theirs stays.

        Args: rows: each T (width 0) or T F (width F), of ``dtype`` or a float type that fits.
        Raises: CorpusError if the folder holds something, or a row has another shape or type or is not finite.
        """
        kind = np.dtype(dtype).newbyteorder("<")
        if kind.name not in _DTYPES or width < 0 or sys.byteorder != "little":
            raise CorpusError(f"{folder}: dtype {kind.name}, width {width}: a cache holds {', '.join(_DTYPES)}")
        folder = Path(folder).absolute()
        aside = None
        try:
            if folder.exists() and any(folder.iterdir()):
                raise CorpusError(f"{folder}: is not empty, perhaps a cache of other data or settings; {_AGAIN}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            with (aside / _DATA).open("wb") as file:
                lengths, digest = _write_rows(file, rows, kind, width, folder)
            index = {"format": FORMAT, "key": key, "dtype": kind.name, "width": width, "lengths": lengths}
            size = sum(lengths) * max(1, width) * kind.itemsize
            _write_index(aside / _INDEX, {**index, "data_size": size, "data_sha256": digest})
            aside.chmod(0o755)  # temporary folders are born private
            try:
                os.rename(aside, folder)
            except OSError:
                if not cls.exists(folder, key):  # else another run has made the same meanwhile
                    raise
        except OSError as error:
            raise CorpusError(f"{folder}: the cache cannot be written: {error}; check the folder and space") from error
        finally:
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)
        return cls.open(folder, key)

    @classmethod
    def open(cls, folder: str | Path, key: str) -> RaggedCache:
        """Open a cache whose key must be ``key``.

        Raises: CorpusError if there is none, it is damaged, or it was made from another corpus or other settings.
        """
        folder = Path(folder).absolute()
        index = _read_index(folder)
        if index["key"] != key:
            raise CorpusError(
                f"{folder}: is a cache of another corpus or other settings ({index['key']!r}, wanted {key!r}); {_AGAIN}"
            )
        return cls(folder, index)


_AGAIN: Final = "delete the folder to make it again, or name another one"


def _write_rows(
    file: BinaryIO, rows: Iterable[NDArray[Any]], kind: np.dtype[Any], width: int, folder: Path
) -> tuple[list[int], str]:
    digest = hashlib.sha256()
    lengths = []
    for i, row in enumerate(rows):
        shape_fits = row.ndim == 2 and row.shape[1] == width if width else row.ndim == 1
        if not shape_fits or not (row.dtype == kind or (row.dtype.kind == "f" and kind.kind == "f")):
            wanted = f"{kind.name} [T{f', {width}' if width else ''}]"
            raise CorpusError(f"{folder}: row {i} is {row.dtype} {list(row.shape)}, must be {wanted}; convert it first")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(row, dtype=kind)
        if kind.kind == "f" and not np.isfinite(stored).all():
            raise CorpusError(f"{folder}: row {i} holds numbers that are not finite as {kind.name}; check its audio")
        data = stored.tobytes()
        file.write(data)
        digest.update(data)
        lengths.append(len(stored))
    file.flush()
    os.fsync(file.fileno())
    return lengths, digest.hexdigest()


def _write_index(path: Path, body: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump({"sha256": _hash(body), "body": body}, file)
        file.flush()
        os.fsync(file.fileno())


def _read_index(folder: Path) -> Mapping[str, Any]:
    """The body of the index, after every check that needs no look at the data itself."""
    try:
        stored = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        size = (folder / _DATA).stat().st_size
    except FileNotFoundError as error:
        raise CorpusError(f"{folder}: holds no cache; build it first, or name another folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CorpusError(f"{folder}: the index of this cache cannot be read: {error}; {_AGAIN}") from error
    body = stored.get("body") if isinstance(stored, dict) else None
    if not isinstance(body, dict) or stored.get("sha256") != _hash(body):
        raise CorpusError(f"{folder}: the index of this cache is damaged; {_AGAIN}")
    if body.get("format") != FORMAT:
        raise CorpusError(f"{folder}: is {body.get('format')!r}, this version reads {FORMAT!r}; {_AGAIN}")
    try:
        lengths, width, item = body["lengths"], body["width"], np.dtype(body["dtype"]).itemsize
        sound = body["dtype"] in _DTYPES and width >= 0 and min(lengths, default=0) >= 0
        sound = sound and sum(lengths) * max(1, width) * item == body["data_size"] and isinstance(body["key"], str)
    except (KeyError, TypeError) as error:
        raise CorpusError(f"{folder}: the index of this cache is damaged: {error!r}; {_AGAIN}") from error
    if not sound or body["data_size"] != size:
        raise CorpusError(f"{folder}: data.bin has {size} bytes, the index says {body['data_size']}; {_AGAIN}")
    return body


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
