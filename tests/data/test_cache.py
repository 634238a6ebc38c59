"""The cache gives back what was put in, and never rows of another corpus."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from manyvoice.data.cache import RaggedCache
from manyvoice.errors import CorpusError


def rows(lengths: list[int], width: int = 0, dtype: str = "int16") -> list[NDArray[Any]]:
    gen = np.random.default_rng(0)
    return [gen.integers(-99, 99, (n, width) if width else n).astype(dtype) for n in lengths]


@given(st.lists(st.integers(0, 7), max_size=8), st.sampled_from([(0, "int16"), (3, "float16"), (1, "float32")]))
def test_rows_come_back(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], form: tuple[int, str]) -> None:
    width, dtype = form
    put = rows(lengths, width, dtype)
    folder = tmp_path_factory.mktemp("cache") / "c"
    built = RaggedCache.build(folder, "k", iter(put), dtype, width)
    for cache in (built, RaggedCache.open(folder, "k"), pickle.loads(pickle.dumps(built))):
        assert len(cache) == len(put)
        for i in reversed(range(len(put))):
            assert cache[i].dtype == put[i].dtype and cache[i].shape == put[i].shape
            assert np.array_equal(cache[i], put[i])
        cache.verify()
        with pytest.raises(IndexError):
            cache[len(put)]
    assert not put or np.array_equal(built[-1], put[-1])


def test_a_row_is_a_copy(tmp_path: Path) -> None:
    cache = RaggedCache.build(tmp_path / "c", "k", rows([4]), np.int16)
    cache[0][:] = 0
    assert np.array_equal(cache[0], rows([4])[0])


def test_another_corpus_or_other_settings_are_refused(tmp_path: Path) -> None:
    RaggedCache.build(tmp_path / "c", "abc 80 mels", rows([4]), np.int16)
    assert RaggedCache.exists(tmp_path / "c", "abc 80 mels")
    assert not RaggedCache.exists(tmp_path / "c", "abc 128 mels") and not RaggedCache.exists(tmp_path / "d", "k")
    message = r"c: is a cache of another corpus or other settings \('abc 80 mels', wanted 'abc 128 mels'\); delete the"
    with pytest.raises(CorpusError, match=message):
        RaggedCache.open(tmp_path / "c", "abc 128 mels")
    with pytest.raises(CorpusError, match=r"c: is not empty, .*; delete the folder to make it again, or name another"):
        RaggedCache.build(tmp_path / "c", "abc 128 mels", rows([4]), np.int16)
    with pytest.raises(CorpusError, match="holds no cache; build it first"):
        RaggedCache.open(tmp_path / "none", "k")


def test_damage_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    cache = RaggedCache.build(folder, "k", rows([40, 50]), np.int16)
    data = (folder / "data.bin").read_bytes()
    (folder / "data.bin").write_bytes(data[:-2])
    with pytest.raises(CorpusError, match=r"data\.bin has 178 bytes, the index says 180; delete the folder"):
        RaggedCache.open(folder, "k")
    (folder / "data.bin").write_bytes(b"\x55" + data[1:])
    with pytest.raises(CorpusError, match="the data of this cache is damaged"):
        cache.verify()
    index = (folder / "index.json").read_text()
    (folder / "index.json").write_text(index.replace("[40, 50]", "[50, 40]"))
    with pytest.raises(CorpusError, match="the index of this cache is damaged"):
        RaggedCache.open(folder, "k")
    for text in ("", "{", "[]", "null", '{"body": {}}', "\udcff"):
        (folder / "index.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(CorpusError, match="the index of this cache"):
            RaggedCache.open(folder, "k")


def test_an_index_of_another_version_is_named(tmp_path: Path) -> None:
    from manyvoice.data import cache as module

    RaggedCache.build(tmp_path / "c", "k", rows([4]), np.int16)
    body = json.loads((tmp_path / "c/index.json").read_text())["body"]
    for change, message in (({"format": "x.v9"}, r"is 'x\.v9', this version reads"), ({"width": None}, "is damaged")):
        module._write_index(tmp_path / "c/index.json", {**body, **change})
        with pytest.raises(CorpusError, match=message):
            RaggedCache.open(tmp_path / "c", "k")


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[NDArray[Any]]:
        yield from rows([3])
        raise CorpusError("row 1 is bad")

    with pytest.raises(CorpusError, match="row 1 is bad"):
        RaggedCache.build(tmp_path / "c", "k", failing(), np.int16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "row,dtype,width,message",
    [
        (np.zeros(3, np.float32), "int16", 0, r"row 0 is float32 \[3\], must be int16 \[T\]; convert it first"),
        (np.zeros((3, 4), np.float32), "float16", 5, r"row 0 is float32 \[3, 4\], must be float16 \[T, 5\]"),
        (np.zeros((3, 4), np.int16), "int16", 0, r"must be int16 \[T\]"),
        (np.asarray([1e9], np.float32), "float16", 0, "not finite as float16; check its audio"),
        (np.asarray([np.nan], np.float32), "float32", 0, "not finite"),
        (np.zeros(3, np.int64), "int64", 0, "dtype int64, width 0: a cache holds int16, float16, float32"),
    ],
)
def test_rows_of_another_kind_are_refused(
    tmp_path: Path, row: NDArray[Any], dtype: str, width: int, message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        RaggedCache.build(tmp_path / "c", "k", [row], dtype, width)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_corpus_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file/sub"):
        with pytest.raises(CorpusError, match="the cache cannot be written"):
            RaggedCache.build(folder, "k", rows([3]), np.int16)


def test_what_another_run_made_meanwhile_stays(tmp_path: Path) -> None:
    def slow() -> Iterator[NDArray[Any]]:
        yield rows([4])[0]
        RaggedCache.build(tmp_path / "c", "k", rows([4]), np.int16)

    assert np.array_equal(RaggedCache.build(tmp_path / "c", "k", slow(), np.int16)[0], rows([4])[0])

    def other() -> Iterator[NDArray[Any]]:
        yield rows([4])[0]
        RaggedCache.build(tmp_path / "d", "other", rows([5]), np.int16)

    with pytest.raises(CorpusError, match="cannot be written"):
        RaggedCache.build(tmp_path / "d", "k", other(), np.int16)
