"""Where a store keeps its files: a local folder, or whatever fsspec reaches (``s3://``, ``gs://``, ``memory://``).

Paths are relative to the place and have forward slashes. Every write is whole or did not happen.
"""

from __future__ import annotations

import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, final

from manyvoice.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Two changes within one tick of a file system's clock look like one; no clock in use ticks slower than this.
_TICK_NS = 2_000_000_000
_LEFTOVER = ".tmp-"
# What file systems say of a file that changes whenever it does, best first.
_VERSIONS = ("ETag", "etag", "md5Hash", "generation")
# When it last did, often in whole seconds and by a clock that is not ours: only what is older than this is known by it.
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
_SETTLED_S = 60.0


@final
@dataclass(frozen=True)
class Found:
    """A file or folder in a listing.

    Args: name: the last part of its path.  stamp: another one after every change; empty where that cannot be known.
    """

    name: str
    stamp: str
    is_folder: bool

    @property
    def is_leftover(self) -> bool:
        """What a process that was killed while writing left behind."""
        return _LEFTOVER in self.name


class Place(ABC):
    """Files by relative path. Everything raises OSError, FileNotFoundError among it.

    Attributes: url: where it is.  locks: whether :meth:`lock` keeps other writers out.  readers: reads worth making at
        once.
    """

    url: str
    locks: bool
    readers: int

    @abstractmethod
    def read(self, path: str) -> bytes:
        """All of a file."""

    @abstractmethod
    def head(self, path: str, count: int) -> tuple[bytes, int]:
        """At most the first ``count`` bytes of a file, and how many it has."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Make or replace a file, and the folders above it."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a file, if there is one."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether there is a file."""

    @abstractmethod
    def list(self, folder: str) -> list[Found]:
        """What is in a folder; nothing where there is none."""

    @abstractmethod
    def lock(self, path: str) -> AbstractContextManager[None]:
        """Inside, no other process or thread is."""

    def shown(self, path: str) -> str:
        """A path for messages."""
        return f"{self.url.rstrip('/')}/{path}"


def open_place(place: str | Path) -> Place:
    """The place of that path or URL; nothing is made or read yet.

    Raises: UsageError for a kind of URL that fsspec does not know or lacks a package for.
    """
    text = str(place)
    if isinstance(place, Path) or ("://" not in text and "::" not in text):
        return LocalPlace(Path(place))
    if text.startswith(("file://", "local://")):
        return LocalPlace(Path(text.partition("://")[2]))
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    try:
        system, root = url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"store {text}: cannot be reached ({error}); install the package that fsspec wants, or name a local folder"
        ) from error
    # one place has one URL, whatever slashes were typed: what is known of it here is kept under that
    chained = "::" in text
    return RemotePlace(text.rstrip("/") if chained else str(system.unstrip_protocol(root)).rstrip("/"), system, root)


@final
class LocalPlace(Place):
    """A folder."""

    locks = fcntl is not None
    readers = 1

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().resolve()
        self.url = str(self.folder)

    def read(self, path: str) -> bytes:
        try:
            return (self.folder / path).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from error

    def head(self, path: str, count: int) -> tuple[bytes, int]:
        with (self.folder / path).open("rb") as file:
            return file.read(count), os.fstat(file.fileno()).st_size

    def write(self, path: str, data: bytes) -> None:
        target = self.folder / path
        aside = target.with_name(f"{target.name}{_LEFTOVER}{secrets.token_hex(4)}")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def remove(self, path: str) -> None:
        (self.folder / path).unlink(missing_ok=True)

    def exists(self, path: str) -> bool:
        return (self.folder / path).is_file()

    def list(self, folder: str) -> list[Found]:
        found = []
        try:
            with os.scandir(self.folder / folder) as entries:
                for entry in entries:
                    # one that has gone since is no longer of interest
                    with suppress(FileNotFoundError):
                        found.append(Found(entry.name, _local_stamp(entry.stat()), entry.is_dir()))
        except FileNotFoundError:
            return []
        return found

    @contextmanager
    def lock(self, path: str) -> Iterator[None]:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(target, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _local_stamp(stat: os.stat_result) -> str:
    if abs(time.time_ns() - stat.st_mtime_ns) < _TICK_NS:
        return ""
    return f"{stat.st_mtime_ns} {stat.st_size} {stat.st_ino}"


@final
class RemotePlace(Place):
    """A folder of an fsspec file system. One put is one object, whole or not there; there are no locks."""

    locks = False
    readers = 16

    def __init__(self, url: str, system: Any, root: str) -> None:
        self.url, self._system, self._root = url, system, root.rstrip("/")

    def read(self, path: str) -> bytes:
        with _as_os_error():
            return bytes(self._system.cat_file(self._at(path)))

    def head(self, path: str, count: int) -> tuple[bytes, int]:
        with _as_os_error():
            size = int(self._system.size(self._at(path)))
            return bytes(self._system.cat_file(self._at(path), start=0, end=min(count, size))), size

    def write(self, path: str, data: bytes) -> None:
        with _as_os_error():
            self._system.makedirs(self._at(path).rpartition("/")[0], exist_ok=True)
            self._system.pipe_file(self._at(path), data)

    def remove(self, path: str) -> None:
        with suppress(FileNotFoundError), _as_os_error():
            self._system.rm_file(self._at(path))

    def exists(self, path: str) -> bool:
        with _as_os_error():
            self._system.invalidate_cache()
            return bool(self._system.isfile(self._at(path)))

    def list(self, folder: str) -> list[Found]:
        here = self._at(folder)
        with _as_os_error():
            # others write too: what was listed before may be old
            self._system.invalidate_cache()
            try:
                rows = self._system.ls(here, detail=True)
            except FileNotFoundError:
                return []
        found = []
        for row in rows:
            name = str(row["name"]).rstrip("/").rpartition("/")[2]
            # object stores list the marker of an empty folder as if it were in itself
            if str(row["name"]).strip("/") != here.strip("/"):
                found.append(Found(name, _remote_stamp(row), row["type"] == "directory"))
        return found

    def lock(self, path: str) -> AbstractContextManager[None]:
        return nullcontext()

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


def _remote_stamp(row: Mapping[str, Any]) -> str:
    version = next((row[key] for key in _VERSIONS if row.get(key)), None)
    if version is None:
        version = next((row[key] for key in _TIMES if row.get(key)), None)
        seconds = _seconds(version)
        if seconds is None or abs(time.time() - seconds) < _SETTLED_S:
            return ""
    return f"{version} {row.get('size')}"


def _seconds(when: Any) -> float | None:
    """Since 1970, of what file systems take for a time; None if it cannot be told, as without a time zone."""
    with suppress(ValueError, TypeError):
        if isinstance(when, str):
            when = datetime.fromisoformat(when)
        if isinstance(when, datetime):
            return when.timestamp() if when.tzinfo else None
        return float(when)
    return None


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Clients of object stores raise errors of their own for a wrong key or a lost connection."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
