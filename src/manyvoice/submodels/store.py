"""A store of voices: content-addressed files, and the names that people call them by, apart for each tenant.

    store.json                           {"format": "store.v1"}
    TENANT/voices/SHA256.safetensors     a voice, called by its content
    TENANT/names/NAME.json               {"voice": SHA256, "name": NAME, "added": when}

In a folder, or in whatever fsspec reaches. Only names ever change, and one changes in a single step: a reader sees the
old voice or the new one. In a folder, writers of any number of processes take turns. Object storage has no locks: there
two writers that replace one name at the same moment may leave a voice that no name needs, which :meth:`Store.rebuild`
removes.
"""

from __future__ import annotations

import difflib
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from manyvoice.errors import UsageError, VoiceError
from manyvoice.submodels.index import Copies, Entry, Index, Names, index_of
from manyvoice.submodels.names import HASH, cached_as, name_path, quote, tenant_path, unquote, voice_path
from manyvoice.submodels.places import LocalPlace, open_place
from manyvoice.submodels.voice import Voice, read_metadata, size_of

FORMAT = "store.v1"
TENANT = "default"
_MARK = "store.json"
_PREFIX = re.compile(r"[0-9a-f]{8,63}")
# Of a voice's file at first: the header of one with a few hundred tensors.
_HEAD = 1 << 16
# Times that a reader follows a name which is replaced under its eyes.
_TRIES = 8


@final
@dataclass(frozen=True)
class Added:
    """Args: replaced: the hash that the name had before, if it had another."""

    name: str
    hash: str
    replaced: str | None


@final
class Store:
    """Voices by name in one place; nothing is made or read before it is needed. Safe to share and to fork.

    Args:
        place: a folder, or a URL that fsspec knows.
        index: where its local index is kept, if not in the user's cache folder.
    Raises: UsageError for a URL that cannot be reached, and from what reads, if no store is there.  VoiceError from
        whatever finds a damaged file or cannot write.
    """

    def __init__(self, place: str | Path, *, index: Path | None = None) -> None:
        self._place = open_place(place)
        self.url = self._place.url
        self._index = Index(index or index_of(self.url))
        self._copies = Copies(self.url)
        self._known = False

    @property
    def is_local(self) -> bool:
        """Whether its files are in a folder of this machine."""
        return isinstance(self._place, LocalPlace)

    def add(self, voice: Voice, name: str, tenant: str = TENANT) -> str:
        """Keep a voice under a name, in place of what had the name before; returns its hash."""
        return self.add_many([(name, voice)], tenant)[0].hash

    def add_many(self, voices: Iterable[tuple[str, Voice]], tenant: str = TENANT) -> list[Added]:
        """Keep many: as :meth:`add` for each, but voices that lost their last name are looked for only once."""
        self.make()
        done: list[Added] = []
        try:
            for name, voice in voices:
                done.append(self._add(voice, name, tenant))
        finally:
            lost = {one.replaced for one in done if one.replaced}
            if lost:
                with self._writing("cannot remove what was replaced"), self._locked(tenant):
                    self._sweep(tenant, lost)
        return done

    def resolve(self, name: str, tenant: str = TENANT) -> str:
        """The hash that a name stands for now. A hash, or at least 8 digits that begin only one, stands for itself.

        Raises: UsageError for an unknown name, with some like it.
        """
        self._check()
        alias = self._alias(name, tenant)
        if alias is not None:
            return alias.hash
        if HASH.fullmatch(name) and self.has(name, tenant):
            return name
        if _PREFIX.fullmatch(name):
            found = [hash for hash in self.hashes(tenant) if hash.startswith(name)]
            if len(found) == 1:
                return found[0]
            if found:
                raise UsageError(f"voice {name}: {len(found)} begin like that, such as {found[0]}; give more digits")
        raise UsageError(self._unknown(name, tenant))

    def find(self, name: str, tenant: str = TENANT) -> str | None:
        """The hash that a name stands for now, or None."""
        self._check()
        alias = self._alias(name, tenant)
        return None if alias is None else alias.hash

    def load(self, hash: str, tenant: str = TENANT) -> Voice:
        """The voice of that hash, checked against it."""
        self._check()
        try:
            return self._load(hash, tenant)
        except FileNotFoundError as error:
            raise self._missing(hash, tenant) from error

    def get(self, name: str, tenant: str = TENANT) -> Voice:
        """The voice that a name stands for."""
        for attempt in range(_TRIES):
            hash = self.resolve(name, tenant)
            try:
                return self._load(hash, tenant)
            except FileNotFoundError:
                # replaced since its name was read: the next look finds the new voice
                time.sleep(0.005 * attempt)
        return self.load(self.resolve(name, tenant), tenant)

    def entry(self, name: str, tenant: str = TENANT) -> Entry:
        """What the files say of a name, or of a hash, without the weights."""
        for _ in range(_TRIES):
            hash = self.resolve(name, tenant)
            alias = self._alias(name, tenant) or _Alias(name="", hash=hash, added="")
            try:
                return self._describe(alias, tenant)
            except FileNotFoundError:
                continue
        raise self._missing(hash, tenant)

    def has(self, hash: str, tenant: str = TENANT) -> bool:
        """Whether a voice of that hash is there."""
        path = voice_path(hash, tenant)
        with self._reading(path):
            return self._place.exists(path)

    def remove(self, name: str, tenant: str = TENANT) -> bool:
        """Forget a name, and its voice if no other name of the tenant stands for it: in the store, in this machine's
        index, and in the disk caches that work with it here no byte of either is left.

        Returns: whether the voice is gone.
        """
        self._check()
        path = name_path(name, tenant)
        if not self._place.exists(path):
            raise UsageError(self._unknown(name, tenant))
        # asked first, because nothing is to be half removed when the index cannot be written
        self._index.tenants()
        with self._writing(f"cannot remove {name!r}"), self._locked(tenant):
            try:
                alias = self._alias(name, tenant)
            except VoiceError:
                # a name that cannot be read can be removed; its voice then has no name, or another one
                alias = None
            self._place.remove(path)
            gone = self._sweep(tenant, {alias.hash} if alias else set(), leftovers=True)
        return alias is None or alias.hash in gone

    def entries(self, tenant: str | None = None) -> list[Entry]:
        """All names of a tenant, or of all tenants, in order; only what is new since the last time is read."""
        self._check()
        tenants = sorted({*self.tenants(), *self._index.tenants()}) if tenant is None else [tenant]
        return [entry for one in tenants for entry in self._index.entries(one, self._names(one))]

    def tenants(self) -> list[str]:
        """That have a folder here."""
        self._check()
        with self._reading(""):
            folders = [found.name for found in self._place.list("") if found.is_folder]
        return sorted(name for folder in folders if (name := unquote(folder)) is not None)

    def hashes(self, tenant: str = TENANT) -> set[str]:
        """Of all voices of a tenant, from the files."""
        self._check()
        folder = f"{tenant_path(tenant)}/voices"
        with self._reading(folder):
            stems = [f.name.partition(".") for f in self._place.list(folder)]
        return {stem for stem, _, suffix in stems if suffix == "safetensors" and HASH.fullmatch(stem)}

    def rebuild(self) -> None:
        """Make the index again from the files; remove what interrupted writers left, and voices that no name needs."""
        self._check()
        self._index.drop()
        with self._writing("cannot be cleaned"):
            self._remove_leftovers("")
            for tenant in self.tenants():
                with self._locked(tenant):
                    self._sweep(tenant, set(), leftovers=True)

    def remember_cache(self, folder: Path) -> None:
        """A folder with copies of this store's voices, as ``names.cached_as`` names them; they are removed with it."""
        self._copies.remember(folder)

    def _missing(self, hash: str, tenant: str) -> VoiceError:
        return VoiceError(
            f"{self._place.shown(voice_path(hash, tenant))}: there is no such voice; add its file again with "
            f"`manyvoice voices {self.url} add FILE --name NAME`"
        )

    def _add(self, voice: Voice, name: str, tenant: str) -> Added:
        hash, path, alias = voice.hash, voice_path(voice.hash, tenant), name_path(name, tenant)
        document = {"voice": hash, "name": name, "added": datetime.now(UTC).isoformat(timespec="microseconds")}
        with self._writing(f"cannot add {name!r}"), self._locked(tenant):
            try:
                before = self._alias(name, tenant)
            except VoiceError:
                before = None
            # written even if it is there: this is how a damaged one is repaired
            self._place.write(path, voice.data)
            self._place.write(alias, json.dumps(document, ensure_ascii=False).encode())
            if not self._place.locks and not self._place.exists(path):
                # somebody else found it without a name before it had one
                self._place.write(path, voice.data)
        return Added(name, hash, before.hash if before and before.hash != hash else None)

    def _load(self, hash: str, tenant: str) -> Voice:
        path = voice_path(hash, tenant)
        with self._reading(path):
            data = self._place.read(path)
        return Voice.from_bytes(data, self._place.shown(path), hash=hash)

    def _alias(self, name: str, tenant: str) -> _Alias | None:
        return self._read_alias(name_path(name, tenant))

    def _read_alias(self, path: str) -> _Alias | None:
        """What the file of a name says; None if there is none. VoiceError if it is damaged."""
        try:
            with self._reading(path):
                data = self._place.read(path)
        except FileNotFoundError:
            return None
        try:
            found = json.loads(data)
            alias = _Alias(found["name"], found["voice"], found["added"])
            if not HASH.fullmatch(alias.hash) or path.rpartition("/")[2] != f"{quote(alias.name)}.json":
                raise ValueError("it is not what its name says")
            datetime.fromisoformat(alias.added)
        except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise VoiceError(
                f"{self._place.shown(path)}: is no name of this store, or not written to its end ({error!r}); remove "
                "that file, or add the voice under this name again"
            ) from error
        return alias

    def _describe(self, alias: _Alias, tenant: str) -> Entry:
        """Raises: FileNotFoundError if the voice has gone, VoiceError if it is none."""
        path = voice_path(alias.hash, tenant)
        with self._reading(path):
            data, size = self._place.head(path, _HEAD)
            header = 8 + int.from_bytes(data[:8], "little")
            if len(data) < min(header, size):
                data, size = self._place.head(path, header)
        where = self._place.shown(path)
        document = read_metadata(data, where)
        if size != (whole := size_of(data)):
            raise VoiceError(f"{where}: has {size} of {whole} bytes; copy the voice again from where it is whole")
        method, base, card = (document.get(key) for key in ("method", "base", "card"))
        if not (isinstance(method, str) and isinstance(base, str) and isinstance(card, dict)):
            raise VoiceError(f"{where}: says no method, base and card; add the voice again from where it is whole")
        text = method.isascii() and base.isascii()
        return Entry(
            tenant=tenant, name=alias.name, hash=alias.hash, method=method if text else "?", base=base if text else "?",
            bytes=size, added=alias.added, card=card,
        )  # fmt: skip

    def _names(self, tenant: str) -> Names:
        folder = f"{tenant_path(tenant)}/names"

        def listed() -> dict[str, str]:
            with self._reading(folder):
                return {f.name: f.stamp for f in self._place.list(folder) if f.name.endswith(".json")}

        def read(files: Sequence[str]) -> list[tuple[str, Entry]]:
            if self._place.readers == 1 or len(files) == 1:
                found = [self._entry_of(file, tenant) for file in files]
            else:
                with ThreadPoolExecutor(self._place.readers) as pool:
                    found = list(pool.map(lambda file: self._entry_of(file, tenant), files))
            return [(file, entry) for file, entry in zip(files, found, strict=True) if entry is not None]

        return Names(listed, read)

    def _entry_of(self, file: str, tenant: str) -> Entry | None:
        """What stands in the index for a name's file; None if it has gone."""
        path = f"{tenant_path(tenant)}/names/{file}"
        hash, name, problem = "", unquote(file.removesuffix(".json")) or file, ""
        for _ in range(_TRIES):
            try:
                alias = self._read_alias(path)
                if alias is None:
                    return None
                hash, name = alias.hash, alias.name
                return self._describe(alias, tenant)
            except FileNotFoundError:
                problem = f"{self._place.shown(voice_path(hash, tenant))}: is missing; add the voice again"
            except VoiceError as error:
                problem = str(error)
                break
        return Entry(tenant=tenant, name=name, hash=hash, problem=problem)

    def _sweep(self, tenant: str, lost: set[str], *, leftovers: bool = False) -> set[str]:
        """Remove voices that no name stands for, of those lost, or with ``leftovers`` of all; returns their hashes."""
        named = self._index.named(tenant, self._names(tenant))
        # a name that cannot be read may need any voice but those that are known to be another's
        if leftovers and "" not in named:
            lost = lost | self.hashes(tenant)
        stray, caches = lost - named, self._copies.folders()
        kept: dict[str, bytes] = {}
        for hash in stray:
            path = voice_path(hash, tenant)
            if not self._place.locks and self._place.exists(path):
                kept[path] = self._place.read(path)
            self._place.remove(path)
        if leftovers and self._place.locks:
            for part in ("", "/names", "/voices"):
                self._remove_leftovers(f"{tenant_path(tenant)}{part}")
        if kept:
            # without locks somebody may have given one of them a name meanwhile
            needed = self._index.named(tenant, self._names(tenant)) & stray
            for hash in needed:
                self._place.write(voice_path(hash, tenant), kept[voice_path(hash, tenant)])
            stray = stray - needed
        # after the store: who copies a voice looks afterwards whether the store still has it
        for folder in caches:
            for hash in stray:
                # half written copies too
                for copy in folder.glob(f"{cached_as(hash, tenant)}*"):
                    copy.unlink(missing_ok=True)
        return stray

    def _remove_leftovers(self, folder: str) -> None:
        for found in self._place.list(folder):
            if found.is_leftover and not found.is_folder:
                self._place.remove(f"{folder}/{found.name}".lstrip("/"))

    def _unknown(self, name: str, tenant: str) -> str:
        folder = f"{tenant_path(tenant)}/names"
        with self._reading(folder):
            files = [f.name.removesuffix(".json") for f in self._place.list(folder) if f.name.endswith(".json")]
        names = {found.casefold(): found for file in files if (found := unquote(file)) is not None}
        near = [names[key] for key in difflib.get_close_matches(name.casefold(), names, n=3)]
        if near:
            return f"no voice {name!r} in {self.url}, tenant {tenant!r}; is it {' or '.join(map(repr, near))}?"
        return (
            f"no voice {name!r} among the {len(files)} names of tenant {tenant!r} in {self.url}; "
            f"`manyvoice voices {self.url} ls --tenant {tenant}` lists them"
        )

    def _check(self) -> None:
        """Raises: UsageError if no store is there, VoiceError if one of another version is."""
        if self._known:
            return
        try:
            with self._reading(_MARK):
                data = self._place.read(_MARK)
        except FileNotFoundError as error:
            raise UsageError(
                f"{self.url}: there is no store of voices; `manyvoice personalize` makes one, and so does `manyvoice "
                f"voices {self.url} add FILE`"
            ) from error
        try:
            found = json.loads(data)["format"]
        except (ValueError, KeyError, TypeError):
            found = "unreadable"
        if found != FORMAT:
            raise VoiceError(
                f"{self._place.shown(_MARK)}: format {found!r}, but this version reads {FORMAT!r}; name another store, "
                f'or if the voices beside it are whole, write {{"format": "{FORMAT}"}} into it'
            )
        self._known = True

    def make(self) -> None:
        """A store where there is nothing yet. Raises: UsageError where there is something else."""
        if self._known and self._place.exists(_MARK):
            return
        self._known = False
        with self._writing("cannot be made"):
            if self.may_be_made():
                self._place.write(_MARK, json.dumps({"format": FORMAT}).encode())
        self._check()

    def may_be_made(self) -> bool:
        """Whether there is nothing yet; False if a store is there. Raises: UsageError where there is something else."""
        with self._writing("cannot be made"):
            others = [found.name for found in self._place.list("") if not found.is_leftover]
            # the mark comes before everything else, so whoever sees another's files sees it now
            if self._place.exists(_MARK):
                return False
            if others:
                raise UsageError(
                    f"{self.url}: holds other files, such as {sorted(others)[0]}, and is no store of voices; name "
                    "an empty folder or a new one"
                )
            return True

    def _locked(self, tenant: str) -> Any:
        return self._place.lock(f"{tenant_path(tenant)}/lock")

    @contextmanager
    def _writing(self, deed: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise VoiceError(
                f"{self.url}: {deed} ({error}); make room, make it writable, or name another store"
            ) from error

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """What is not there has a meaning of its own, and passes."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise VoiceError(
                f"{self._place.shown(path)}: cannot be read ({error}); make it readable, or name another store"
            ) from error


@final
@dataclass(frozen=True)
class _Alias:
    name: str
    hash: str
    added: str
