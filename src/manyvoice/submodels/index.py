"""A local list of what a store holds, so that ten thousand voices are listed without being read.

It is a cache and never the truth: it follows the store's names whenever it is asked, and one that is damaged or of
another version is thrown away and made again without a word. What is removed is overwritten in the file too.

Apart from it, and not to be thrown away, stands which folders on this machine keep copies of the store's voices.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar, final

from manyvoice.data.cache import user_cache
from manyvoice.errors import VoiceError
from manyvoice.submodels.places import LocalPlace

T = TypeVar("T")

_VERSION = 2
_SCHEMA = """
CREATE TABLE voices (
    tenant TEXT, file TEXT, stamp TEXT, name TEXT, hash TEXT, method TEXT, base TEXT, bytes INTEGER, added TEXT,
    card TEXT, problem TEXT, PRIMARY KEY (tenant, file)
) WITHOUT ROWID;
"""
_COLUMNS = "tenant, name, hash, method, base, bytes, added, card, problem"
# Of SQLite's result codes: an error in the tables, a damaged file, no database at all.
_DAMAGE = (1, 11, 26)
# Seconds to wait for another process that is reading thousands of new voices into the same index.
_PATIENCE = 600.0


@final
@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a store knows of one name without reading its weights.

    Args:
        hash: of the voice; empty if the name's file cannot be read.
        method, base: its name, and the fingerprint of the base model.
        bytes: of the voice's file.
        added: when, ISO 8601 in UTC.
        card: as the voice has it.
        problem: what is wrong with its files; empty if nothing is.
    """

    tenant: str
    name: str
    hash: str
    method: str = ""
    base: str = ""
    bytes: int = 0
    added: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def index_of(url: str) -> Path:
    """Where the index of a store is kept: ``$MANYVOICE_CACHE/stores``, or the user's cache folder."""
    return user_cache("stores") / f"{_digest(url)}.sqlite"


def copies_of(url: str) -> Path:
    """Where copies of a far store's voices lie on this machine: ``$MANYVOICE_CACHE/voices``, or the user's."""
    return user_cache("voices") / _digest(url)


@final
class Copies:
    """Folders on this machine that keep copies of a store's voices: a small file for each, in ``$MANYVOICE_CACHE``.

    Raises: VoiceError if they cannot be read or written.
    """

    def __init__(self, url: str) -> None:
        self._place = LocalPlace(user_cache("copies") / _digest(url))

    def folders(self) -> list[Path]:
        """That :meth:`remember` was told of."""
        try:
            names = [found.name for found in self._place.list("") if not found.is_leftover]
            return [Path(self._place.read(name).decode()) for name in sorted(names)]
        except OSError as error:
            raise self._failed(error) from error

    def remember(self, folder: Path) -> None:
        """A folder with copies."""
        try:
            self._place.write(_digest(str(folder)), str(folder).encode())
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> VoiceError:
        return VoiceError(
            f"{self._place.url}: says where copies of voices are, and cannot be used ({error}); let MANYVOICE_CACHE "
            "name a folder that can be, and has room"
        )


@final
@dataclass(frozen=True)
class Names:
    """Where a tenant's names are read.

    Args: listed: the stamp of each file of a name now; empty where it cannot be known.  read: what such files say; one
        that has gone since is left out.
    """

    listed: Callable[[], Mapping[str, str]]
    read: Callable[[Sequence[str]], Iterable[tuple[str, Entry]]]


@final
class Index:
    """One SQLite file; safe to use from any number of threads and processes.

    Raises: VoiceError from every method if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self, tenant: str, names: Names) -> list[Entry]:
        """A tenant's, by name, as its files are now."""

        def work(db: sqlite3.Connection) -> list[Entry]:
            _follow(db, tenant, names)
            found = db.execute(f"SELECT {_COLUMNS} FROM voices WHERE tenant = ? ORDER BY name, file", (tenant,))
            return [_entry(row) for row in found]

        return self._run(work)

    def named(self, tenant: str, names: Names) -> set[str]:
        """The hashes that a tenant's names stand for now; an empty one for a name that cannot be read."""

        def work(db: sqlite3.Connection) -> set[str]:
            _follow(db, tenant, names)
            return {row[0] for row in db.execute("SELECT DISTINCT hash FROM voices WHERE tenant = ?", (tenant,))}

        return self._run(work)

    def tenants(self) -> list[str]:
        """That have entries."""
        return self._run(lambda db: [row[0] for row in db.execute("SELECT DISTINCT tenant FROM voices")])

    def drop(self) -> None:
        """Forget all entries."""

        def work(db: sqlite3.Connection) -> None:
            # not by unlinking the file, which other processes may be writing
            db.execute("DELETE FROM voices")
            db.execute("COMMIT")
            db.execute("VACUUM")

        self._run(work)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """In one transaction, on a connection of its own: it crosses no thread and no fork."""
        for last in (False, True):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with closing(sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)) as db:
                    db.execute("PRAGMA secure_delete = ON")
                    db.execute("PRAGMA temp_store = MEMORY")
                    db.execute("PRAGMA synchronous = NORMAL")
                    db.execute("BEGIN IMMEDIATE")
                    _prepare(db)
                    result = work(db)
                    if db.in_transaction:
                        db.execute("COMMIT")
                    return result
            except (sqlite3.Error, OSError) as error:
                if not last and getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE:
                    self._unlink()
                    continue
                raise VoiceError(
                    f"{self.path}: the index of a store cannot be written ({error}); let MANYVOICE_CACHE name a folder "
                    "that can be, and has room"
                ) from error
        raise AssertionError("the second attempt returns or raises")

    def _unlink(self) -> None:
        for path in (self.path, self.path.with_name(self.path.name + "-journal")):
            path.unlink(missing_ok=True)


def _prepare(db: sqlite3.Connection) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == _VERSION:
        return
    for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        db.execute(f'DROP TABLE "{name}"')
    # not executescript, which would commit first
    for statement in filter(str.strip, _SCHEMA.split(";")):
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {_VERSION}")


def _follow(db: sqlite3.Connection, tenant: str, names: Names) -> None:
    """Bring a tenant's rows to what its files say."""
    # Listed inside the transaction: a name that somebody removes meanwhile is taken out after it was put in.
    now = names.listed()
    known = dict(db.execute("SELECT file, stamp FROM voices WHERE tenant = ?", (tenant,)).fetchall())
    stale = [file for file, stamp in now.items() if not stamp or known.get(file) != stamp]
    new, reread = dict(names.read(stale)) if stale else {}, set(stale)
    gone = [file for file in known if file not in now or (file in reread and file not in new)]
    db.executemany("DELETE FROM voices WHERE tenant = ? AND file = ?", [(tenant, file) for file in gone])
    rows = [_row(entry, file, now[file]) for file, entry in new.items()]
    db.executemany(f"INSERT OR REPLACE INTO voices VALUES ({', '.join('?' * 11)})", rows)
    db.execute("COMMIT")
    if gone:
        # overwrites what SQLite has moved about inside the file as well
        db.execute("VACUUM")


def _row(entry: Entry, file: str, stamp: str) -> tuple[str | int, ...]:
    # a damaged voice may be repaired without its name being touched, so it is read again every time
    stamp = "" if entry.problem else stamp
    card = json.dumps(dict(entry.card))
    return (
        entry.tenant, file, stamp, entry.name, entry.hash, entry.method, entry.base, entry.bytes, entry.added, card,
        entry.problem,
    )  # fmt: skip


def _entry(row: Sequence[Any]) -> Entry:
    named = dict(zip(_COLUMNS.split(", "), row, strict=True))
    return Entry(**{**named, "card": json.loads(named["card"])})


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()
