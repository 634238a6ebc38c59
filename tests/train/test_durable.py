from __future__ import annotations

import errno
import hashlib
import os
import re

import pytest

from manyvoice.errors import CheckpointError
from manyvoice.train.durable import beside, hash_of, place, rename, sync, writing


def test_names_beside_are_all_different(tmp_path):
    found = {beside(tmp_path / "step-1", "tmp").name for _ in range(50)}
    assert len(found) == 50 and all(re.fullmatch(r"step-1\.tmp-[0-9a-f]{8}", name) for name in found)


def test_a_hash_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"voice" * 100_000)
    assert hash_of(tmp_path / "a") == hashlib.sha256(b"voice" * 100_000).hexdigest()


@pytest.mark.parametrize(("code", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_only_a_folder_may_refuse_to_sync_and_only_for_being_unable(tmp_path, monkeypatch, code, passes):
    (tmp_path / "file").write_bytes(b"x")

    def refuse(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError):
        sync(tmp_path / "file")
    if passes:
        sync(tmp_path)
    else:
        with pytest.raises(OSError):
            sync(tmp_path)


def test_renaming_syncs_the_folder(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle)))
    (tmp_path / "a").mkdir()
    rename(tmp_path / "a", tmp_path / "b")
    assert synced == [tmp_path.stat().st_ino] and (tmp_path / "b").is_dir()


def test_an_interrupt_between_two_names_puts_the_old_folder_back(tmp_path):
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)

    def interrupt(phase):
        if phase == "moved":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place(tmp_path / "new", tmp_path / "target", interrupt)
    assert (tmp_path / "target" / "which").read_text() == "target"
    place(tmp_path / "new", tmp_path / "target", lambda phase: None)
    assert (tmp_path / "target" / "which").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_only_system_errors_are_reworded(tmp_path):
    (tmp_path / "aside").mkdir()
    with pytest.raises(ZeroDivisionError), writing("do it", tmp_path, tmp_path / "aside"):
        _ = 1 / 0
    assert not (tmp_path / "aside").exists()
    with (
        pytest.raises(CheckpointError, match=r"cannot do it: .*Permission denied; \d+\.\d+ GB are free there"),
        writing("do it", tmp_path / "not" / "yet"),
    ):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
