"""Files and folders that are on the disk before anything relies on them."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from manyvoice.errors import CheckpointError


def beside(path: Path, why: str) -> Path:
    """A name of its own next to a path: ``<path>.<why>-<8 hexadecimal digits>``."""
    # secrets, not random: saving must not move the random state that it saves
    return path.with_name(f"{path.name}.{why}-{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network file systems cannot sync a folder and say so with these
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def rename(path: Path, target: Path) -> None:
    """Rename within one folder, durably; what stood at ``target`` is replaced if it is a file or empty."""
    os.replace(path, target)
    sync(path.parent)


def place(aside: Path, folder: Path, tell: Callable[[str], None]) -> None:
    """Give a finished folder its name; one that has it steps aside first, and returns if that fails.

    A process killed in between leaves it as ``<folder>.old-...``.
    """
    old = beside(folder, "old") if folder.exists() else None
    if old:
        os.replace(folder, old)
    try:
        if old:
            tell("moved")
        os.replace(aside, folder)
    except BaseException:
        if old:
            os.replace(old, folder)
        raise
    tell("placed")
    sync(folder.parent)
    if old:
        shutil.rmtree(old)


def hash_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(deed: str, folder: Path, aside: Path | None = None) -> Iterator[None]:
    """Whatever goes wrong inside removes the aside folder.

    Raises: CheckpointError in place of an OSError, with what was tried and the space left at ``folder``.
    """
    try:
        yield
    except BaseException as error:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        way_out = "earlier checkpoints are untouched; make room, make it writable or choose another folder"
        raise CheckpointError(f"cannot {deed}: {error}; {_space(folder)}; {way_out}") from error


def _space(folder: Path) -> str:
    for there in (folder, *folder.absolute().parents):
        if there.is_dir():
            return f"{shutil.disk_usage(there).free / 1e9:.3f} GB are free there"
    return "the space left there is unknown"
