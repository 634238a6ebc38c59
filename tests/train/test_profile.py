"""Batch profiles on disk: found for exactly their job, refused by name for another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from manyvoice.errors import UsageError
from manyvoice.train.profile import Profile, check_fits, find, parse_bytes, read, store

KEY = {"model": "abc", "device": "a processor", "limit": "8GiB"}
PROFILE = Profile(
    key=KEY, bins=[(1.5, 9), (2.5, 12)], sizes=[40, 20], bytes_of=[10, 20], how="counted", confirmed=1.01, seconds=3.5
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MANYVOICE_CACHE", str(tmp_path))
    return tmp_path


def test_a_profile_is_found_again_for_its_key_only() -> None:
    assert find(KEY) is None
    path = store(PROFILE)
    assert path is not None and find(KEY) == PROFILE == read(path)
    assert find({**KEY, "limit": "4GiB"}) is None


def test_a_profile_of_another_model_is_refused_by_what_differs() -> None:
    with pytest.raises(UsageError, match=r"another training job \(model is 'xyz' but was 'abc'\)"):
        check_fits(PROFILE, {**KEY, "model": "xyz"})


def test_a_file_under_a_false_name_is_not_taken(cache: Path) -> None:
    path = store(PROFILE)
    other = replace(PROFILE, key={**KEY, "model": "xyz"})
    assert path is not None
    path.rename(cache / "profiles" / f"{other.name}.json")
    assert find(other.key) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"bins": 3}', '{"key": {}, "bins": [[1, 2]], "sizes": [0]}'])
def test_a_damaged_profile_is_measured_again(text: str) -> None:
    path = store(PROFILE)
    assert path is not None
    path.write_text(text)
    assert find(KEY) is None
    with pytest.raises(UsageError, match="is no batch profile .* delete it"):
        read(path)


def test_a_cache_that_cannot_be_written_is_not_fatal(cache: Path) -> None:
    (cache / "profiles").write_text("in the way")
    assert store(PROFILE) is None
    assert find(KEY) is None


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 2**33), ("500 MB", 5 * 10**8), ("0.5 gib", 2**29), ("4096", 4096), ("1kb", 1000)]
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "8 GiBs", "-1GiB", "GiB", "nan GiB", "inf"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must be an amount such as 8GiB"):
        parse_bytes(text)
