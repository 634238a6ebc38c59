"""A cache gives what the store has, within its bytes, loads nothing twice at once, and forgets in all tiers."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from manyvoice.errors import UsageError, VoiceError
from manyvoice.submodels.cache import VoiceCache
from manyvoice.submodels.method import make_method
from manyvoice.submodels.names import cached_as
from manyvoice.submodels.store import Store
from manyvoice.submodels.voice import Voice

SIZE = 400  # bytes of one voice's tensors


def voice(seed: int, size: int = SIZE) -> Voice:
    gain = torch.randn(size // 4, generator=torch.Generator().manual_seed(seed))
    return Voice(method=make_method("scale"), tensors={("0.ff1.up", "gain"): gain}, base="b" * 64, tokenizer="d" * 64)


FILE = len(voice(0).data)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Far away: it keeps nothing on this machine but its index."""
    made = Store(f"memory://{uuid4().hex}", index=tmp_path / "index.sqlite")
    made.add_many((f"s{k}", voice(k)) for k in range(8))
    return made


@pytest.fixture
def hashes(store: Store) -> list[str]:
    return [store.resolve(f"s{k}") for k in range(8)]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every hash that was asked of a store."""
    asked: list[str] = []
    load = Store.load
    monkeypatch.setattr(Store, "load", lambda self, hash, *more: (asked.append(hash), load(self, hash, *more))[1])
    return asked


def test_the_least_recently_used_leaves(store: Store, hashes: list[str], loads: list[str]) -> None:
    cache = VoiceCache(store, host_bytes=2 * SIZE + 10)
    a, b, c = hashes[:3]
    for hash in (a, b, a, c, a, b):
        assert cache.get(hash).hash == hash
    assert loads == [a, b, c, b]
    found = cache.statistics()
    assert (found.hits, found.misses, found.loads, found.evictions) == (2, 4, 4, 2)
    assert (found.voices, found.bytes, found.from_disk, found.disk_bytes) == (2, 2 * SIZE, 0, 0)
    assert found.load_seconds > 0


def test_what_is_kept_is_the_voice_without_its_file(store: Store, hashes: list[str]) -> None:
    kept = VoiceCache(store, host_bytes=SIZE).get(hashes[0])
    assert "data" not in vars(kept) and kept.size == SIZE
    assert kept.hash == hashes[0] and "data" not in vars(kept), "the hash needs no file"
    assert torch.equal(kept.tensors["0.ff1.up", "gain"], voice(0).tensors["0.ff1.up", "gain"])
    assert kept.data == voice(0).data


def test_bounds_hold_whatever_is_asked(store: Store, hashes: list[str], tmp_path: Path) -> None:
    cache = VoiceCache(store, host_bytes=3 * SIZE, disk=tmp_path / "disk", disk_bytes=4 * FILE)
    rng = random.Random(0)
    for _ in range(120):
        assert cache.get(hash := rng.choice(hashes)).hash == hash
        assert cache.statistics().bytes <= 3 * SIZE
        assert sum(p.stat().st_size for p in (tmp_path / "disk").rglob("*.*")) <= 4 * FILE
    assert cache.statistics().from_disk > 0
    small = VoiceCache(store, host_bytes=SIZE - 1)
    assert small.get(hashes[0]).hash == hashes[0] and small.statistics().voices == 0
    narrow = VoiceCache(store, host_bytes=2 * SIZE)
    narrow.pin(hashes[0])
    narrow.get(hashes[1])
    store.add(voice(9, SIZE + 4), "large")
    assert narrow.get(store.resolve("large")).size == SIZE + 4
    assert narrow.statistics().voices == 2 and narrow.statistics().evictions == 0, "what cannot stay drives nobody out"
    with pytest.raises(UsageError, match="disk_bytes = -1: must be 0 or more"):
        VoiceCache(store, host_bytes=1, disk_bytes=-1)


def test_pinned_voices_stay(store: Store, hashes: list[str], loads: list[str]) -> None:
    cache = VoiceCache(store, host_bytes=2 * SIZE)
    assert cache.pin(hashes[0]).hash == hashes[0]
    cache.pin(hashes[0])
    for hash in hashes[1:]:
        cache.get(hash)
    cache.get(hashes[0])
    assert loads == hashes
    cache.unpin(hashes[0])
    cache.pin(hashes[1])
    assert cache.statistics().pinned_bytes == 2 * SIZE
    with pytest.raises(UsageError, match="host_bytes = 800: 2 voices are pinned, .* of 400 bytes .*; 2 like it fit in"):
        cache.pin(hashes[2])
    assert cache.get(hashes[3]).hash == hashes[3], "what is not pinned is given all the same"
    cache.unpin(hashes[0])
    cache.unpin(hashes[0])
    assert cache.pin(hashes[2]).hash == hashes[2]
    assert cache.statistics().pinned_bytes == 2 * SIZE


def test_two_that_want_one_voice_load_it_once(
    store: Store, hashes: list[str], loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, go, counted = VoiceCache(store, host_bytes=8 * SIZE), threading.Event(), Store.load

    def slow(self: Store, hash: str, *more: str) -> Voice:
        go.wait(20)
        return counted(self, hash, *more)

    monkeypatch.setattr(Store, "load", slow)
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(cache.get, hashes[k % 2]) for k in range(6)]
        while cache.statistics().misses < 6:
            time.sleep(0.001)
        go.set()
        assert [w.result().hash for w in waiting] == [hashes[k % 2] for k in range(6)]
    assert sorted(loads) == sorted(hashes[:2])


def test_many_threads_get_what_they_ask_for(store: Store, hashes: list[str], tmp_path: Path) -> None:
    cache = VoiceCache(store, host_bytes=2 * SIZE, disk=tmp_path / "disk", disk_bytes=3 * FILE)

    def ask(seed: int) -> Iterator[tuple[str, str]]:
        rng = random.Random(seed)
        for _ in range(60):
            hash = rng.choice(hashes)
            if rng.random() < 0.1:
                cache.forget(hash)
            yield hash, cache.get(hash).hash

    with ThreadPoolExecutor(4) as pool:
        for answers in pool.map(lambda seed: list(ask(seed)), range(4)):
            assert all(asked == got for asked, got in answers)
    found = cache.statistics()
    assert found.hits + found.misses == 240 and found.bytes == found.voices * SIZE <= 2 * SIZE


def test_prefetched_voices_are_there(store: Store, hashes: list[str], loads: list[str]) -> None:
    cache = VoiceCache(store, host_bytes=8 * SIZE)
    cache.prefetch([*hashes[:3], "f" * 64, "no hash", hashes[3]])
    while cache.statistics().loads < 4:
        time.sleep(0.001)
    cache.close()
    assert loads == [*hashes[:3], "f" * 64, "no hash", hashes[3]]
    for hash in hashes[:4]:
        cache.get(hash)
    found = cache.statistics()
    assert (found.hits, found.misses, found.loads) == (4, 0, 4)
    with pytest.raises(VoiceError, match="there is no such voice"):
        cache.get("f" * 64)


def test_tenants_share_nothing(store: Store, hashes: list[str], tmp_path: Path) -> None:
    cache = VoiceCache(store, host_bytes=8 * SIZE, disk=tmp_path / "disk", disk_bytes=8 * FILE)
    cache.get(hashes[0])
    for _ in range(2):
        with pytest.raises(VoiceError, match="there is no such voice"):
            cache.get(hashes[0], "clinic")
    store.add(voice(0), "ann", "clinic")
    cache.get(hashes[0], "clinic")
    cache.forget(hashes[0])
    assert cache.statistics().voices == 1
    assert [p.parent.name for p in (tmp_path / "disk").rglob("*.*")] == ["clinic"]


def test_the_disk_is_asked_before_the_store_and_not_believed(
    store: Store, hashes: list[str], loads: list[str], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    VoiceCache(store, host_bytes=0, disk=disk, disk_bytes=9 * FILE).get(hashes[0])
    again = VoiceCache(store, host_bytes=0, disk=disk, disk_bytes=9 * FILE)
    assert again.get(hashes[0]).hash == hashes[0] and loads == hashes[:1]
    found = again.statistics()
    assert (found.from_disk, found.disk_bytes) == (1, FILE)
    path = disk / cached_as(hashes[0], "default")
    for data in (voice(1).data, voice(0).data[:-1], b""):
        path.write_bytes(data)
        loads.clear()
        assert again.get(hashes[0]).hash == hashes[0] and loads == hashes[:1]
        assert path.read_bytes() == voice(0).data


def test_the_disk_keeps_what_was_used_last(store: Store, hashes: list[str], tmp_path: Path) -> None:
    cache = VoiceCache(store, host_bytes=0, disk=tmp_path / "disk", disk_bytes=2 * FILE)
    paths = [tmp_path / "disk" / cached_as(hash, "default") for hash in hashes]
    for k, hash in enumerate(hashes[:2]):
        cache.get(hash)
        os.utime(paths[k], ns=(k, k))
    cache.get(hashes[0])
    cache.get(hashes[2])
    assert [path.exists() for path in paths[:3]] == [True, False, True]


def test_a_disk_that_cannot_be_used_is_told_or_done_without(
    store: Store, hashes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(VoiceError, match="file/disk: cannot hold copies"):
        VoiceCache(store, host_bytes=0, disk=tmp_path / "file" / "disk", disk_bytes=FILE)
    cache = VoiceCache(store, host_bytes=SIZE, disk=tmp_path / "disk", disk_bytes=2 * FILE)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cache.get(hashes[0]).hash == hashes[0]


def copies(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_voice_that_is_removed_leaves_the_disk(
    store: Store, hashes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    cache = VoiceCache(store, host_bytes=0, disk=disk, disk_bytes=9 * FILE)
    for hash in hashes:
        cache.get(hash)
    half = disk / f"{cached_as(hashes[0], 'default')}.tmp-01234567"
    half.write_bytes(voice(0).data[:100])
    # another process, which knows of the cache from what this machine keeps of the store
    other = Store(store.url, index=tmp_path / "index.sqlite")
    other.remove("s0")
    other.add(voice(20), "s1")
    assert not any(p.name.startswith((hashes[0], hashes[1])) for p in copies(disk)) and len(copies(disk)) == 6
    with pytest.raises(VoiceError, match="there is no such voice"):
        cache.get(hashes[0])
    # the index is thrown away, and the place is spelled another way
    (tmp_path / "index.sqlite").unlink()
    Store(f"{store.url}/").remove("s3")
    assert not any(p.name.startswith(hashes[3]) for p in copies(disk))
    # another machine, which does not know of it
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("MANYVOICE_CACHE", str(tmp_path / "far"))
        Store(store.url).remove("s2")
    VoiceCache(store, host_bytes=0, disk=disk, disk_bytes=9 * FILE)
    assert {p.name[:64] for p in copies(disk)} == set(hashes[4:])


@pytest.mark.parametrize("how", ["forgotten", "removed"])
def test_a_load_under_way_brings_nothing_back(
    store: Store, hashes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    cache = VoiceCache(store, host_bytes=9 * SIZE, disk=tmp_path / "disk", disk_bytes=9 * FILE)
    load = Store.load

    def meanwhile(self: Store, hash: str, *more: str) -> Voice:
        found = load(self, hash, *more)
        cache.forget(hash) if how == "forgotten" else store.remove("s0")
        return found

    monkeypatch.setattr(Store, "load", meanwhile)
    assert cache.get(hashes[0]).hash == hashes[0], "it was asked for before"
    assert copies(tmp_path / "disk") == []
    assert cache.statistics().voices == (0 if how == "forgotten" else 1)
    cache.forget(hashes[0])
    assert cache.statistics().voices == cache.statistics().bytes == 0


def test_forgetting_takes_pins_and_all_tiers(store: Store, hashes: list[str], tmp_path: Path) -> None:
    cache = VoiceCache(store, host_bytes=2 * SIZE, disk=tmp_path / "disk", disk_bytes=9 * FILE)
    cache.pin(hashes[0])
    cache.forget(hashes[0])
    assert copies(tmp_path / "disk") == []
    found = cache.statistics()
    assert (found.voices, found.bytes, found.pinned_bytes) == (0, 0, 0)
    cache.unpin(hashes[0])
    cache.forget(hashes[0])


def test_a_voice_removed_while_it_is_pinned_does_not_come_back(
    store: Store, hashes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = VoiceCache(store, host_bytes=10 * SIZE)
    got = VoiceCache._get

    def removed_meanwhile(self: VoiceCache, key: tuple[str, str], *, counted: bool) -> Voice:
        found = got(self, key, counted=counted)
        cache.forget(key[1])
        return found

    monkeypatch.setattr(VoiceCache, "_get", removed_meanwhile)
    with pytest.raises(VoiceError, match="was removed while it was loaded"):
        cache.pin(hashes[0])
    assert (cache.statistics().voices, cache.statistics().pinned_bytes) == (0, 0)
