"""Voices near at hand: in memory, and for a store far away on a local disk as well, both bounded in bytes.

    host    voices by (tenant, hash), the least recently used leaves first; pinned ones stay
    disk    TENANT/SHA256.safetensors, checked against the hash whenever it is read

A voice is called by its hash, so nothing here can be stale; whoever asks resolves the name first.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from manyvoice.errors import UsageError, VoiceError
from manyvoice.submodels.index import copies_of
from manyvoice.submodels.names import HASH, cached_as, unquote
from manyvoice.submodels.places import LocalPlace
from manyvoice.submodels.store import TENANT, Store
from manyvoice.submodels.voice import Voice

Key = tuple[str, str]  # tenant, hash
_DIGITS = 64  # of a hash
# Copies of what is far away, on this machine's disk: some thousand voices of a few hundred kB, our choice.
_DISK_BYTES = 2**30


@final
@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a cache did since it was made.

    Args:
        hits, misses: of :meth:`VoiceCache.get`; a miss is one that had to wait for a load.
        loads: voices read, ahead of time too.  from_disk: how many of them from the disk tier.
        load_seconds: that all loads took.
        evictions: voices that left the host to make room.
        voices, bytes: on the host now.  pinned_bytes: of those that stay.
        disk_bytes: on the disk, as far as this process knows.
    """

    hits: int
    misses: int
    loads: int
    from_disk: int
    load_seconds: float
    evictions: int
    voices: int
    bytes: int
    pinned_bytes: int
    disk_bytes: int


@final
class VoiceCache:
    """Voices of a store by hash. Safe to share between threads; two that want one voice load it once.

    Args:
        host_bytes: that voices' tensors may take in memory; a voice larger than that is given but not kept.
        disk: a folder of this cache's own, for a store that is not on this machine.
        disk_bytes: that files in it may take.
    Raises: UsageError for a bound below 0.  VoiceError if the folder cannot be used.
    """

    def __init__(self, store: Store, *, host_bytes: int, disk: Path | None = None, disk_bytes: int = 0) -> None:
        for name, value in (("host_bytes", host_bytes), ("disk_bytes", disk_bytes)):
            if value < 0:
                raise UsageError(f"{name} = {value}: must be 0 or more bytes")
        self.store, self.host_bytes = store, host_bytes
        self._disk = None if disk is None or not disk_bytes else _Disk(disk, disk_bytes, store)
        self._lock = threading.Lock()
        self._host: OrderedDict[Key, Voice] = OrderedDict()
        self._loading: dict[Key, Future[Voice]] = {}
        self._pins: Counter[Key] = Counter()
        self._bytes = 0
        # how often each was, so that whoever loads it meanwhile can tell
        self._forgotten: Counter[Key] = Counter()
        self._hits = self._misses = self._loads = self._from_disk = self._evictions = 0
        self._seconds = 0.0
        self._ahead: ThreadPoolExecutor | None = None

    def get(self, hash: str, tenant: str = TENANT) -> Voice:
        """The voice, without the bytes of its file. VoiceError if the tenant has none of that hash."""
        return self._get((tenant, hash), counted=True)

    def prefetch(self, hashes: Iterable[str], tenant: str = TENANT) -> None:
        """Load in the background. What goes wrong there goes wrong again, and is told, when the voice is asked for."""

        def load(key: Key) -> None:
            with suppress(VoiceError, UsageError):
                self._get(key, counted=False)

        for hash in hashes:
            key = (tenant, hash)
            with self._lock:
                if key in self._host or key in self._loading:
                    continue
                if self._ahead is None:
                    self._ahead = ThreadPoolExecutor(1, thread_name_prefix="voices")
                self._ahead.submit(load, key)

    def pin(self, hash: str, tenant: str = TENANT) -> Voice:
        """Load, and keep until :meth:`unpin` was called as often. UsageError if it does not fit beside other pins."""
        key = (tenant, hash)
        with self._lock:
            before = self._forgotten[key]
        voice = self._get(key, counted=True)
        with self._lock:
            if self._forgotten[key] != before:
                raise VoiceError(f"voice {hash[:12]} was removed while it was loaded; ask for the name again")
            taken = self._pinned_bytes()
            if key not in self._pins and taken + voice.size > self.host_bytes:
                fit = len(self._pins) + max(0, self.host_bytes - taken) // max(1, voice.size)
                raise UsageError(
                    f"host_bytes = {self.host_bytes}: {len(self._pins)} voices are pinned, and this one of "
                    f"{voice.size} bytes does not fit beside them; {fit} like it fit in all: pin no more, or raise "
                    "the bound"
                )
            self._pins[key] += 1
            self._keep(key, voice)
        return voice

    def unpin(self, hash: str, tenant: str = TENANT) -> None:
        """Let go of a pinned voice; one that is not pinned stays as it is."""
        key = (tenant, hash)
        with self._lock:
            self._pins[key] -= 1
            if self._pins[key] <= 0:
                del self._pins[key]
            self._shrink()

    def forget(self, hash: str, tenant: str = TENANT) -> None:
        """Drop a voice from memory and disk, pinned or not; a load under way is not kept either."""
        key = (tenant, hash)
        with self._lock:
            self._forgotten[key] += 1
            self._loading.pop(key, None)
            self._pins.pop(key, None)
            if (voice := self._host.pop(key, None)) is not None:
                self._bytes -= voice.size
        if self._disk is not None:
            self._disk.remove(key)

    def statistics(self) -> Statistics:
        """Counts so far."""
        with self._lock:
            return Statistics(
                hits=self._hits, misses=self._misses, loads=self._loads, from_disk=self._from_disk,
                load_seconds=self._seconds, evictions=self._evictions, voices=len(self._host), bytes=self._bytes,
                pinned_bytes=self._pinned_bytes(),
                disk_bytes=0 if self._disk is None else self._disk.taken,
            )  # fmt: skip

    def close(self) -> None:
        """Give up what is loaded ahead of time, and wait for the load that runs."""
        with self._lock:
            ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.shutdown(cancel_futures=True)

    def _get(self, key: Key, *, counted: bool) -> Voice:
        with self._lock:
            voice = self._host.get(key)
            if voice is not None:
                self._host.move_to_end(key)
                self._hits += counted
                return voice
            self._misses += counted
            future = self._loading.get(key)
            mine = future is None
            if future is None:
                future = self._loading[key] = Future()
        if mine:
            self._load(key, future)
        return future.result()

    def _load(self, key: Key, future: Future[Voice]) -> None:
        started = time.perf_counter()
        try:
            voice, from_disk = self._read(key, future)
        except BaseException as error:
            with self._lock:
                if self._loading.get(key) is future:
                    del self._loading[key]
            future.set_exception(error)
            return
        with self._lock:
            self._loads += 1
            self._from_disk += from_disk
            self._seconds += time.perf_counter() - started
            # whoever forgot it meanwhile took the future away
            if self._loading.get(key) is future:
                del self._loading[key]
                self._keep(key, voice)
        future.set_result(voice)

    def _read(self, key: Key, future: Future[Voice]) -> tuple[Voice, bool]:
        tenant, hash = key
        if self._disk is not None and (found := self._disk.read(key)) is not None:
            return found.slimmed(), True
        voice = self.store.load(hash, tenant)
        if self._disk is not None:
            self._disk.write(key, voice.data)
            with self._lock:
                forgotten = self._loading.get(key) is not future
            # asked after writing: whoever removes it from the store later looks for copies later still
            if forgotten or not self.store.has(hash, tenant):
                self._disk.remove(key)
        return voice.slimmed(), False

    def _keep(self, key: Key, voice: Voice) -> None:
        if key not in self._pins and voice.size > self.host_bytes - self._pinned_bytes():
            # it would drive all others out and then leave itself
            return
        if key not in self._host:
            self._host[key] = voice
            self._bytes += voice.size
        self._host.move_to_end(key)
        self._shrink()

    def _pinned_bytes(self) -> int:
        return sum(self._host[key].size for key in self._pins)

    def _shrink(self) -> None:
        while self._bytes > self.host_bytes:
            # there is one: what is pinned fits by itself
            key = next(key for key in self._host if key not in self._pins)
            self._bytes -= self._host.pop(key).size
            self._evictions += 1


def near(store: Store, *, host_bytes: int) -> VoiceCache:
    """A cache as a store wants it: one that is not on this machine keeps copies on the disk, in the user's cache."""
    disk = None if store.is_local else copies_of(store.url)
    return VoiceCache(store, host_bytes=host_bytes, disk=disk, disk_bytes=_DISK_BYTES)


@final
class _Disk:
    """Files by tenant and hash; the least recently used leaves first. What cannot be written is not kept."""

    def __init__(self, folder: Path, limit: int, store: Store) -> None:
        self._place, self._limit = LocalPlace(folder), limit
        try:
            self._place.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VoiceError(
                f"{folder}: cannot hold copies of voices ({error}); name a folder that can be made"
            ) from error
        store.remember_cache(self._place.folder)
        # removed by others while no cache of this folder was open on this machine
        there = {part: store.hashes(tenant) for part in self._parts() if (tenant := unquote(part)) is not None}
        for path in self._files():
            if path.name[:_DIGITS] not in there.get(path.parent.name, ()):
                path.unlink(missing_ok=True)
        self._lock = threading.Lock()
        self.taken = 0
        self._count()

    def read(self, key: Key) -> Voice | None:
        """None for a voice that is not there; one that is damaged is dropped."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
            return Voice.from_bytes(data, str(path), hash=key[1])
        except OSError:
            return None
        except VoiceError:
            self.remove(key)
            return None

    def write(self, key: Key, data: bytes) -> None:
        if len(data) > self._limit:
            return
        with suppress(OSError):
            self._place.write(cached_as(key[1], key[0]), data)
        with self._lock:
            self.taken += len(data)
            if self.taken > self._limit:
                self._count()

    def remove(self, key: Key) -> None:
        with suppress(OSError):
            self._path(key).unlink()

    def _count(self) -> None:
        """What is there, which others may have changed, down to the limit."""
        files = []
        for path in self._files():
            with suppress(OSError):
                stat = path.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
        self.taken = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if self.taken <= self._limit:
                break
            path.unlink(missing_ok=True)
            self.taken -= size

    def _files(self) -> list[Path]:
        """Of voices, half written ones too."""
        return [p for p in self._place.folder.glob("*/*.safetensors*") if HASH.fullmatch(p.name[:_DIGITS])]

    def _parts(self) -> set[str]:
        return {path.parent.name for path in self._files()}

    def _path(self, key: Key) -> Path:
        return self._place.folder / cached_as(key[1], key[0])
