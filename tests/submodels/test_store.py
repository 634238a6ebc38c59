"""A store keeps every voice under its content and its name, apart for each tenant, and forgets exactly."""

from __future__ import annotations

import multiprocessing
import os
import random
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from manyvoice.errors import UsageError, VoiceError
from manyvoice.submodels import places
from manyvoice.submodels.index import Entry
from manyvoice.submodels.method import make_method
from manyvoice.submodels.names import quote, unquote
from manyvoice.submodels.store import Store
from manyvoice.submodels.voice import Voice


def voice(seed: int, speaker: str = "ann") -> Voice:
    gen = torch.Generator().manual_seed(seed)
    tensors = {("0.ff1.up", "gain"): torch.randn(50, generator=gen), ("0.ff1.up", "bias"): torch.zeros(50)}
    return Voice(method=make_method("scale"), tensors=tensors, base="b" * 64, tokenizer="d" * 64,
                 card={"speaker": speaker, "licence": "CC0-1.0"})  # fmt: skip


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    place = tmp_path / "store" if request.param == "folder" else f"memory://{uuid4().hex}/store"
    return Store(place, index=tmp_path / "index" / "x.sqlite")


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", index=tmp_path / "index" / "x.sqlite")


def again(local: Store, index: str = "fresh.sqlite") -> Store:
    """Another process's view of it, with an index of its own."""
    return Store(local.url, index=Path(local.url).parent / "index" / index)


def holding(folder: Path, *needles: str | bytes) -> list[str]:
    """Files below the folder that hold one of these in their bytes or their path."""
    wanted = [n.encode() if isinstance(n, str) else n for n in needles]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(p) for p in files if any(n in p.read_bytes() or n in os.fsencode(p) for n in wanted)]


def test_a_voice_is_called_by_its_content(local: Store) -> None:
    one = voice(1)
    assert local.add(one, "Ann") == local.add(voice(1), "Bob") == one.hash
    files = sorted(p.relative_to(local.url).as_posix() for p in Path(local.url).rglob("*.*"))
    assert files == [
        "default/names/=41nn.json", "default/names/=42ob.json", f"default/voices/{one.hash}.safetensors", "store.json",
    ]  # fmt: skip
    assert Path(local.url, files[2]).read_bytes() == one.data


def test_what_is_kept_is_given_back(store: Store) -> None:
    hash = store.add(voice(1), "ann")
    assert store.resolve("ann") == store.resolve(hash) == store.resolve(hash[:8]) == hash
    assert store.get("ann").data == store.load(hash).data == voice(1).data
    (entry,) = store.entries()
    assert entry == store.entry("ann")
    assert (entry.name, entry.hash, entry.method, entry.base, entry.bytes, entry.card, entry.problem) == (
        "ann", hash, "scale", "b" * 64, len(voice(1).data), {"speaker": "ann", "licence": "CC0-1.0"}, "",
    )  # fmt: skip
    assert entry.added.endswith("+00:00")
    assert store.hashes() == {hash}


def test_tenants_share_nothing(store: Store) -> None:
    mine, theirs = store.add(voice(1), "ann"), store.add(voice(2), "ann", "Clinic.2")
    assert store.tenants() == ["Clinic.2", "default"]
    assert store.get("ann").hash == mine and store.get("ann", "Clinic.2").hash == theirs
    for unknown in (theirs, theirs[:8]):
        with pytest.raises(UsageError, match="no voice"):
            store.resolve(unknown)
    with pytest.raises(VoiceError, match="there is no such voice"):
        store.load(theirs)
    store.add(voice(1), "bob", "Clinic.2")
    assert store.remove("ann")
    assert store.get("bob", "Clinic.2").hash == mine, "one tenant's removal took another's voice"
    assert [(e.tenant, e.name) for e in store.entries()] == [("Clinic.2", "ann"), ("Clinic.2", "bob")]


def test_a_name_that_is_given_anew_lets_the_old_voice_go(store: Store) -> None:
    first, second = store.add(voice(1), "ann"), store.add(voice(2), "ann")
    assert store.get("ann").hash == second and store.hashes() == {second}
    store.add(voice(2), "bob")
    store.add(voice(3), "ann")
    assert store.get("bob").hash == second and len(store.hashes()) == 2, "bob still needs it"
    assert first not in store.hashes()
    added = store.add_many([("ann", voice(4)), ("cem", voice(5)), ("ann", voice(4))])
    assert [one.replaced for one in added] == [voice(3).hash, None, None]
    assert store.hashes() == {voice(k).hash for k in (2, 4, 5)}


def test_an_unknown_name_is_told_with_those_like_it(store: Store) -> None:
    store.add_many((name, voice(1)) for name in ("Annabel", "Bob"))
    with pytest.raises(UsageError, match="no voice 'anabel' in .*, tenant 'default'; is it 'Annabel'"):
        store.resolve("anabel")
    with pytest.raises(UsageError, match="no voice 'zzz' among the 2 names .*ls --tenant default"):
        store.get("zzz")
    with pytest.raises(UsageError, match="is it 'Bob'"):
        store.remove("Bobb")
    with pytest.raises(UsageError, match="among the 0 names of tenant 'none'"):
        store.remove("Bob", "none")
    assert store.tenants() == ["default"], "asking made a tenant"


def test_a_prefix_of_two_voices_is_refused(local: Store) -> None:
    hash = local.add(voice(1), "ann")
    twin = Path(local.url, "default", "voices", f"{hash[:10]}{'0' * 54}.safetensors")
    twin.write_bytes(b"")
    with pytest.raises(UsageError, match=f"voice {hash[:9]}: 2 begin like that"):
        local.resolve(hash[:9])
    assert local.resolve(hash[:12]) == hash
    with pytest.raises(UsageError, match="no voice"):
        local.resolve(hash[:7])


@pytest.mark.parametrize("wrong", ["", "  ", "\ud800"])
def test_a_name_that_is_none_is_refused(local: Store, wrong: str) -> None:
    for name, tenant in ((wrong, "default"), ("ann", wrong)):
        with pytest.raises(UsageError, match="give a name"):
            local.add(voice(1), name, tenant)
    with pytest.raises(UsageError, match="too long"):
        local.add(voice(1), "ann", "T" * 34)
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        local.load("../../store.json")


NAME = st.text(min_size=1).filter(str.strip)


@given(names=st.sets(NAME, min_size=1, max_size=6))
@example(names={"ann", "ANN", "Ann", "..", "../x", "a/b", "a\\b", "=41nn", "store.json", "a\0b", "x" * 300, "X" * 300})
@example(names={"ﬁ", "fi", "é", "e\u0301", "李雷", "%41", "a.json", "~", "*", "con", "::", "Ⅷ" * 90, "a" * 180})
def test_no_name_meets_another_on_any_file_system(names: set[str]) -> None:
    parts = [quote(name) for name in names]
    assert len({part.casefold() for part in parts}) == len(names)
    for name, part in zip(names, parts, strict=True):
        assert part.isascii() and len(part) <= 180 and not set(part) & set("./\\%:*~ ")
        assert unquote(part) == (None if "==" in part else name)


@settings(max_examples=15)
@given(names=st.sets(NAME, min_size=1, max_size=4))
@example(names={"ann", "ANN", "../x", "a/b", "a\0b", "李雷", "x" * 300})
def test_any_name_comes_back(names: set[str]) -> None:
    store = Store(f"memory://{uuid4().hex}", index=Path(os.environ["MANYVOICE_CACHE"], f"{uuid4().hex}.sqlite"))
    added = store.add_many(((name, voice(k)) for k, name in enumerate(names)), "Ténant")
    assert {e.name: e.hash for e in store.entries()} == {one.name: one.hash for one in added}
    assert all(store.resolve(one.name, "Ténant") == one.hash for one in added)
    for name in names:
        store.remove(name, "Ténant")
    assert store.entries() == [] and store.hashes("Ténant") == set()


def test_what_is_removed_leaves_no_byte(local: Store, tmp_path: Path) -> None:
    weights = voice(77).tensors["0.ff1.up", "gain"].numpy().tobytes()[:64]
    local.add_many((f"speaker-{k}-x", voice(k)) for k in range(60, 120))
    mine = voice(77, "Zoë Unique")
    local.add(mine, "speaker-77-x")
    local.entries()
    needles = (mine.hash, "speaker-77-x", "Zoë Unique", "Zo\\u00eb", weights)
    assert len(holding(tmp_path, *needles)) == 3, "the search must see what it is to miss later"
    # what a writer that was killed has left of it
    folder = Path(local.url, "default")
    (folder / "names" / "speaker-77-x.json.tmp-0123abcd").write_bytes(mine.data)
    (folder / "voices" / f"{mine.hash}.safetensors.tmp-0123abcd").write_bytes(mine.data[:500])
    (folder / "voices" / f"{voice(999).hash}.safetensors").write_bytes(mine.data)
    assert local.remove("speaker-77-x")
    assert holding(tmp_path, *needles) == []
    assert len(local.entries()) == 59
    for k in range(66, 90):
        if k != 77:
            local.remove(f"speaker-{k}-x")
            assert holding(tmp_path / "index", f"speaker-{k}-x", voice(k).hash) == []


def test_a_voice_with_two_names_stays_until_the_second_goes(store: Store) -> None:
    hash = store.add(voice(1), "ann")
    store.add(voice(1), "work")
    assert store.remove("ann") is False and store.get("work").hash == hash
    assert store.remove("work") is True and store.hashes() == set()


def test_the_index_made_again_is_the_index(store: Store) -> None:
    store.add_many((f"s{k}", voice(k)) for k in range(20))
    store.add(voice(30), "s3")
    store.remove("s4")
    store.add(voice(5), "s5", "other")
    before = store.entries()
    assert len(before) == 20
    store.rebuild()
    assert store.entries() == before


def test_the_index_follows_other_writers(local: Store) -> None:
    other = again(local)
    local.add_many((f"s{k}", voice(k)) for k in range(5))
    assert other.entries() == local.entries()
    other.add(voice(9), "s1")
    other.remove("s2")
    assert local.entries() == other.entries() and len(local.entries()) == 4
    assert holding(Path(local.url).parent / "index", voice(2).hash) == []


def test_only_what_is_new_is_read(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    local.add_many((f"s{k}", voice(k)) for k in range(6))
    for path in Path(local.url, "default", "names").iterdir():
        os.utime(path, ns=(10**18, 10**18))
    local.entries()
    heads: list[str] = []
    head = places.LocalPlace.head
    monkeypatch.setattr(places.LocalPlace, "head", lambda s, path, n: (heads.append(path), head(s, path, n))[1])
    assert len(local.entries()) == 6 and heads == []
    local.add(voice(9), "s1")
    local.entries()
    assert set(heads) == {f"default/voices/{voice(9).hash}.safetensors"}


@pytest.mark.parametrize("damage", ["no database", "truncated", "another version", "no table"])
def test_a_damaged_index_is_made_again(local: Store, tmp_path: Path, damage: str) -> None:
    local.add_many((f"s{k}", voice(k)) for k in range(40))
    before, path = local.entries(), tmp_path / "index" / "x.sqlite"
    if damage == "no database":
        path.write_bytes(b"so it goes" * 1000)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:9000])
    else:
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version = 99" if damage == "another version" else "DROP TABLE voices")
        db.close()
    assert local.entries() == before
    assert local.entries() == before


def test_an_index_that_cannot_be_written_is_told(local: Store, tmp_path: Path) -> None:
    local.add(voice(1), "ann")
    blocked = Store(local.url, index=local_file(tmp_path) / "x.sqlite")
    with pytest.raises(VoiceError, match="the index of a store cannot be written .*MANYVOICE_CACHE"):
        blocked.remove("ann")
    assert local.get("ann").hash == voice(1).hash, "half removed"


def local_file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file"


def test_where_no_store_is(tmp_path: Path) -> None:
    for place in (tmp_path / "none", tmp_path, local_file(tmp_path), f"memory://{uuid4().hex}"):
        store = Store(place, index=tmp_path / "x.sqlite")
        for read in (store.entries, lambda s=store: s.get("ann"), store.rebuild, lambda s=store: s.remove("ann")):
            with pytest.raises(UsageError, match="there is no store of voices; `manyvoice personalize` makes one.*add"):
                read()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"], "reading made something"
    with pytest.raises(UsageError, match="holds other files, such as file, and is no store"):
        Store(tmp_path, index=tmp_path / "x.sqlite").add(voice(1), "ann")
    with pytest.raises(UsageError, match="nosuch://x: cannot be reached"):
        Store("nosuch://x")


def test_a_store_of_another_version_is_refused(local: Store) -> None:
    local.add(voice(1), "ann")
    mark = Path(local.url, "store.json")
    for text, found in (('{"format": "store.v7"}', "store.v7"), ("{", "unreadable"), ("[]", "unreadable")):
        mark.write_text(text)
        with pytest.raises(VoiceError, match=rf"store\.json: format '{found}', but this version reads 'store\.v1'"):
            again(local).get("ann")


def test_what_cannot_be_written_is_told(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    local.add(voice(1), "ann")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(VoiceError, match="cannot add 'bob' .*No space left.*; make room"):
            local.add(voice(2), "bob")
    assert local.hashes() == {voice(1).hash} and [e.name for e in local.entries()] == ["ann"]
    assert holding(Path(local.url), ".tmp-") == []
    local_file(Path(local.url))
    with pytest.raises(VoiceError, match="cannot add 'bob' .*; make room, make it writable"):
        local.add(voice(2), "bob", "file")


def test_damaged_voices_are_refused_by_name_and_can_be_repaired(local: Store) -> None:
    hash = local.add(voice(1), "ann")
    local.add(voice(2), "bob")
    path = Path(local.url, "default", "voices", f"{hash}.safetensors")
    for data, listed in (
        (voice(1).data[:-9], " bytes; copy"),
        (voice(1).data[:40], "is no voice file"),
        (b"", "is no voice file"),
        (save({"x": torch.ones(2)}), "is no voice file"),
        (voice(3).data, ""),
    ):
        path.write_bytes(data)
        with pytest.raises(VoiceError, match=rf"{hash}\.safetensors: holds .* copy the voice again"):
            local.get("ann")
        local.rebuild()
        ann, bob = local.entries()
        assert listed in ann.problem and bool(ann.problem) == bool(listed) and bob.problem == ""
    path.unlink()
    assert "is missing; add the voice again" in local.entries()[0].problem
    for ask in (local.get, local.entry):
        with pytest.raises(VoiceError, match=rf"{hash}\.safetensors: there is no such voice"):
            ask("ann")
    local.add(voice(1), "ann")
    assert local.get("ann").hash == hash and local.entries()[0].problem == ""


def test_damaged_names_are_refused_by_name_and_cost_nobody_a_voice(local: Store) -> None:
    local.add_many((name, voice(k)) for k, name in enumerate(("ann", "bob")))
    path = Path(local.url, "default", "names", "ann.json")
    foreign = path.with_name("bob.json").read_bytes()
    for data in (b"", b'{"voice": "x', b"{}", b"[]", b'{"voice": 3, "name": "ann", "added": ""}', b"\xff", foreign):
        path.write_bytes(data)
        for ask in (local.get, local.resolve, local.entry):
            with pytest.raises(VoiceError, match=r"names/ann\.json: is no name of this store, or not written to its"):
                ask("ann")
        assert [(e.name, bool(e.problem)) for e in local.entries()] == [("ann", True), ("bob", False)]
        local.remove("bob")
        local.rebuild()
        assert voice(0).hash in local.hashes(), "nobody knows whether ann needs it"
        local.add(voice(1), "bob")
    local.add(voice(0), "ann")
    assert local.get("ann").hash == voice(0).hash
    path.write_bytes(b"{")
    local.remove("ann")
    assert local.hashes() == {voice(1).hash} and [e.name for e in local.entries()] == ["bob"]


def test_what_interrupted_writers_left_is_ignored_and_cleaned(local: Store) -> None:
    local.add(voice(1), "ann")
    root = Path(local.url)
    strays = [root / "store.json.tmp-01234567", root / "default" / "names" / "bob.json.tmp-01234567",
              root / "default" / "voices" / f"{voice(2).hash}.safetensors.tmp-01234567",
              root / "default" / "voices" / f"{voice(3).hash}.safetensors"]  # fmt: skip
    for path in strays:
        path.write_bytes(voice(3).data)
    foreign = root / "default" / "voices" / "notes.txt"
    foreign.write_text("mine")
    assert [e.name for e in local.entries()] == ["ann"]
    local.rebuild()
    assert not any(path.exists() for path in strays) and foreign.exists()
    assert local.get("ann").hash == voice(1).hash


def test_a_voice_that_others_name_meanwhile_survives_where_there_are_no_locks(tmp_path: Path) -> None:
    store = Store(f"memory://{uuid4().hex}", index=tmp_path / "a.sqlite")
    other = Store(store.url, index=tmp_path / "b.sqlite")
    store.add(voice(1), "ann")
    remove = store._place.remove

    def meanwhile(path: str) -> None:
        if "/voices/" in path:
            # bob got the voice before it goes, and looked whether it is there
            store._place.remove = remove  # type: ignore[method-assign]
            other.add(voice(1), "bob")
        remove(path)

    store._place.remove = meanwhile  # type: ignore[method-assign]
    assert store.remove("ann") is False
    assert store.get("bob").hash == voice(1).hash


@pytest.mark.parametrize("stamp", [lambda now: now.replace(microsecond=0), lambda now: int(now.timestamp()), str])
def test_a_place_whose_clock_has_whole_seconds_loses_no_voice(
    stamp: Callable[[datetime], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over sftp: two names given within a second look alike in a listing."""
    store = Store(f"memory://{uuid4().hex}", index=tmp_path / "a.sqlite")
    system, now = fsspec.filesystem("memory"), datetime.now(UTC)
    listed = system.ls

    def coarse(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        rows = [{k: v for k, v in row.items() if k != "created"} for row in listed(*args, **kwargs)]
        return [row | {"mtime": stamp(now)} for row in rows]

    monkeypatch.setattr(system, "ls", coarse)
    for seed, name in ((1, "ann"), (2, "bob"), (3, "ann")):
        store.add(voice(seed), name)
        assert {e.name: e.hash for e in store.entries()}[name] == voice(seed).hash
    store.remove("bob")
    assert store.get("ann").hash == voice(3).hash and store.hashes() == {voice(3).hash}


def test_what_is_known_of_a_remote_name_is_read_once_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"memory://{uuid4().hex}", index=tmp_path / "a.sqlite")
    store.add(voice(1), "ann")
    reads: list[str] = []
    read = store._place.read
    monkeypatch.setattr(store._place, "read", lambda path: reads.append(path) or read(path))
    assert len(store.entries()) == len(store.entries()) == 1 and len(reads) == 2, "a name of this minute may change"
    later = time.time() + 90
    monkeypatch.setattr(places.time, "time", lambda: later)
    assert len(store.entries()) == len(store.entries()) == 1 and len(reads) == 3


NAMES = ("ann", "bob", "cem", "dov")


def _write(url: str, index: Path, seed: int) -> None:
    store, rng = Store(url, index=index), random.Random(seed)
    store.add(voice(seed), f"own-{seed}")
    for _ in range(50):
        name = rng.choice(NAMES)
        if rng.random() < 0.8:
            store.add(voice(rng.randrange(3)), name)
        else:
            try:
                store.remove(name)
            except UsageError as error:
                assert "no voice" in str(error)
    store.add_many((name, voice(seed)) for name in NAMES)
    os._exit(0)


def _read(url: str, index: Path, seed: int) -> None:
    store, rng = Store(url, index=index), random.Random(seed)
    for _ in range(60):
        try:
            found = store.get(rng.choice(NAMES))
            assert found.tensors["0.ff1.up", "gain"].shape == (50,)
        except UsageError as error:
            assert "no voice" in str(error)
        if rng.random() < 0.2:
            assert all(e.hash for e in store.entries())
    os._exit(0)


def test_writers_and_readers_at_once(local: Store, tmp_path: Path) -> None:
    local.add_many((name, voice(0)) for name in NAMES)
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=work, args=(local.url, tmp_path / "index" / index, seed))
        for work, index, seed in (
            (_write, "x.sqlite", 11), (_write, "y.sqlite", 12), (_read, "x.sqlite", 13), (_read, "y.sqlite", 14),
        )
    ]  # fmt: skip
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    entries: list[Entry] = local.entries()
    assert [e.name for e in entries] == sorted((*NAMES, "own-11", "own-12")), "a name was lost"
    assert all(store.get(e.name).hash == e.hash for store in (local, again(local)) for e in entries)
    assert local.hashes() == {e.hash for e in entries}, "a voice that no name needs was left"
    assert holding(Path(local.url), ".tmp-") == []
