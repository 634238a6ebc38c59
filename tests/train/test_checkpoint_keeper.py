"""The set of checkpoints that a run keeps, and what is left when writing one fails or is killed."""

from __future__ import annotations

import errno
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from manyvoice.errors import CheckpointError, UsageError
from manyvoice.train import checkpoint
from manyvoice.train.checkpoint import Keeper, load, save


def fill(value):
    return {"tensors": {"model": {"w": torch.full((3,), float(value))}}, "state": {"value": value}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Writing that fails


PHASES = [
    "aside",
    "model.safetensors written",
    "model.safetensors synced",
    "state.json written",
    "state.json synced",
    "manifest.json written",
    "manifest.json synced",
    "ready",
    "moved",
    "placed",
    "done",
]

KILLED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from manyvoice.train.checkpoint import Keeper

    def fill(value):
        return {"tensors": {"model": {"w": torch.full((3,), float(value))}}, "state": {"value": value}}

    def die(at):
        def on_phase(phase):
            if phase == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return on_phase

    root, step = Path(sys.argv[1]), int(sys.argv[2])
    for at in sys.argv[3:]:
        keeper = Keeper(root / at.replace(" ", "_"), last=2)
        for old in (100, 200):
            keeper.save(old, **fill(old))
        child = os.fork()
        if child == 0:
            keeper.save(step, **fill(999), on_phase=die(at))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(at, "|", os.WTERMSIG(status))
"""


def killed(root, step, phases):
    script = textwrap.dedent(KILLED)
    done = subprocess.run(
        [sys.executable, "-c", script, str(root), str(step), *phases], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"{phase} | 9" for phase in phases], "a phase was never reached"


def test_kill_9_at_any_phase_of_a_new_checkpoint_leaves_a_whole_newest(tmp_path):
    trimming = [f"{deed} step-00000100" for deed in ("deleting", "moved", "deleted")]
    phases = [phase for phase in PHASES if phase != "moved"] + trimming
    killed(tmp_path, 300, phases)
    for phase in phases:
        folder = tmp_path / phase.replace(" ", "_")
        newest = Keeper(folder, last=2, writer=False).newest()
        expected = (300, 999) if phase in ("placed", "done", *trimming) else (200, 200)
        assert (newest.step, load(newest.path).state["value"]) == expected, phase
        keeper = Keeper(folder, last=2)
        assert all(re.fullmatch(r"step-\d{8}", name) for name in names(folder)), f"{phase}: not swept"
        keeper.save(400, **fill(400))
        assert load(keeper.newest().path).state["value"] == 400, phase
        assert len(names(folder)) == 2, phase


def test_kill_9_at_any_phase_of_replacing_leaves_the_old_or_the_new(tmp_path):
    killed(tmp_path, 200, PHASES)
    for phase in PHASES:
        folder = tmp_path / phase.replace(" ", "_")
        newest = Keeper(folder, last=2).newest()
        assert newest.step == 200, phase
        assert load(newest.path).state["value"] == (999 if phase in ("placed", "done") else 200), phase
        assert names(folder) == ["step-00000100", "step-00000200"], phase


@pytest.mark.parametrize("writer", ["_write_tensors", "_write_bytes", "sync", "place"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, writer):
    keeper = Keeper(tmp_path / "checkpoints", last=3)
    keeper.save(100, **fill(100))

    def full(path, *rest, **more):
        if path.is_file():
            path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, writer, full)
    rule = r"cannot write .*checkpoints/step-00000200: .*No space left on device; \d+\.\d+ GB are free there; earlier"
    with pytest.raises(CheckpointError, match=rule):
        keeper.save(200, **fill(200))
    monkeypatch.undo()
    assert names(tmp_path / "checkpoints") == ["step-00000100"]
    assert keeper.newest().step == 100


def test_a_file_limit_of_the_system_is_reported_like_a_full_disk(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*a: .*File too large.* GB are free there"):
            save(tmp_path / "a", tensors={"model": {"w": torch.zeros(10_000)}}, state={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_a_failed_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    save(tmp_path / "a", **fill(1))
    replace = os.replace

    def refuse(source, target):
        if ".tmp-" in str(source):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="cannot write .*Input/output error"):
        save(tmp_path / "a", **fill(2))
    assert names(tmp_path) == ["a"] and load(tmp_path / "a").state == {"value": 1}


def test_an_interrupt_leaves_nothing_aside(tmp_path):
    def interrupt(phase):
        if phase == "state.json written":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a", **fill(1), on_phase=interrupt)
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/a: .*(Not a directory|File exists)"):
        save(tmp_path / "file" / "a", **fill(1))
    with pytest.raises(CheckpointError, match=r"cannot use .*file: .*File exists"):
        Keeper(tmp_path / "file", last=1)


def test_files_can_be_read_by_whom_the_user_allows(tmp_path):
    old = os.umask(0o027)
    try:
        save(tmp_path / "a", **fill(1))
    finally:
        os.umask(old)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "a").iterdir()} == {"0o640"}


# Keeper


def test_it_keeps_the_last_and_the_best(tmp_path):
    keeper = Keeper(tmp_path, last=2, best=2)
    for step, metric in [(1, 0.5), (2, 0.1), (3, 0.4), (4, None), (5, 0.3), (6, math.nan), (7, 0.9)]:
        kept = keeper.save(step, metric, **fill(step))
        assert kept.path == tmp_path / f"step-{step:08d}"
    assert [kept.step for kept in keeper.list()] == [2, 5, 6, 7]
    assert keeper.best().step == 2 and keeper.best().metric == 0.1
    assert keeper.newest().step == 7
    assert load(keeper.newest().path).state == {"value": 7, "kept": {"step": 7, "metric": 0.9}}
    assert Keeper(tmp_path, last=1).list() == keeper.list(), "opening deletes nothing"


def test_of_two_equal_ones_the_later_is_best(tmp_path):
    keeper = Keeper(tmp_path, last=3)
    for step in (1, 2):
        keeper.save(step, 0.25, **fill(step))
    assert keeper.best().step == 2


def test_an_empty_keeper_has_nothing(tmp_path):
    keeper = Keeper(tmp_path / "checkpoints", last=1)
    assert keeper.newest() is None and keeper.best() is None and keeper.list() == ()
    assert Keeper(tmp_path / "never", last=1, writer=False).newest() is None
    assert not (tmp_path / "never").exists()


def test_steps_are_ordered_as_numbers(tmp_path):
    keeper = Keeper(tmp_path, last=5)
    for step in (99_999_999, 100_000_000):
        keeper.save(step, **fill(step))
    assert keeper.newest().step == 100_000_000


def test_a_damaged_newest_is_refused_with_the_way_out(tmp_path):
    keeper = Keeper(tmp_path, last=3)
    for step in (800, 900, 1000):
        keeper.save(step, **fill(step))
    for step in (900, 1000):
        path = tmp_path / f"step-{step:08d}" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    rule = r"step-00001000/model\.safetensors is damaged: .*step-00000800 before it is whole: .*--from step-00000800"
    with pytest.raises(CheckpointError, match=rule):
        keeper.newest()
    shutil.rmtree(tmp_path / "step-00000800")
    with pytest.raises(CheckpointError, match=r"step-00001000/.*none before it is whole: start the run anew"):
        keeper.newest()


def test_a_checkpoint_under_a_name_not_its_own_is_refused_not_overlooked(tmp_path):
    keeper = Keeper(tmp_path, last=3)
    keeper.save(1, **fill(1))
    save(tmp_path / "step-00000009", **fill(9))
    rule = r"step-00000009/state\.json: 'kept' is None, but must tell of step 9, .*resume with --from step-00000001"
    with pytest.raises(CheckpointError, match=rule):
        keeper.newest()
    shutil.rmtree(tmp_path / "step-00000009")
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000007")
    with pytest.raises(CheckpointError, match=r"'step': 1}?.*, but must tell of step 7"):
        keeper.newest()
    assert keeper.list() == ()


def test_going_back_abandons_what_came_after_and_deletes_none_of_it(tmp_path):
    keeper = Keeper(tmp_path, last=1, best=1)
    for step, metric in ((900, 0.2), (1000, 0.9)):
        keeper.save(step, metric, **fill(step))
    keeper.save(950, 0.5, **fill(950))
    assert [kept.step for kept in keeper.list()] == [900, 950]
    assert keeper.newest().step == 950
    (abandoned,) = [name for name in names(tmp_path) if name.startswith("abandoned-step-00001000")]
    keeper.save(1000, 0.4, **fill(1001))
    assert load(tmp_path / abandoned).state["value"] == 1000
    assert load(tmp_path / "step-00001000").state["value"] == 1001


def test_a_damaged_checkpoint_takes_no_place_and_can_be_saved_anew(tmp_path):
    keeper = Keeper(tmp_path, last=2)
    for step in (1, 2):
        keeper.save(step, **fill(step))
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    assert [kept.step for kept in keeper.list()] == [1]
    keeper.save(3, **fill(3))
    assert [kept.step for kept in keeper.list()] == [1, 3], "a damaged one pushed a whole one out"
    keeper.save(2, **fill(2))
    assert keeper.newest().step == 2


def test_only_its_own_leavings_are_swept(tmp_path):
    for name in ("step-00000001.tmp-0123abcd", "step-00000001.gone-0123abcd", "notes.tmp-0123abcd", "step-1"):
        (tmp_path / name).mkdir()
    Keeper(tmp_path, last=1, writer=False)
    assert len(names(tmp_path)) == 4, "a reader swept"
    Keeper(tmp_path, last=1)
    assert names(tmp_path) == ["notes.tmp-0123abcd", "step-1"]


def test_a_keeper_refuses_what_it_must_not_do(tmp_path):
    with pytest.raises(UsageError, match="keep at least the last 1 and the best 0 checkpoints, not last 0 and best 0"):
        Keeper(tmp_path, last=0)
    with pytest.raises(UsageError, match="only reads; save from the process that writes"):
        Keeper(tmp_path, last=1, writer=False).save(1, **fill(1))
    with pytest.raises(UsageError, match="step must be 0 or more, but is -1"):
        Keeper(tmp_path, last=1).save(-1, **fill(1))
    with pytest.raises(UsageError, match="leave 'kept' to the Keeper"):
        Keeper(tmp_path, last=1).save(1, tensors={}, state={"kept": 1})


def test_what_cannot_be_deleted_is_said_after_the_save(tmp_path, monkeypatch):
    keeper = Keeper(tmp_path, last=1)
    keeper.save(1, **fill(1))

    def refuse(path, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(checkpoint, "rename", refuse)
    with pytest.raises(
        CheckpointError, match=r"cannot delete what .*step-00000002, which is saved, .*Permission denied"
    ):
        keeper.save(2, **fill(2))
    assert keeper.newest().step == 2
