"""Checkpoints: folders of safetensors and JSON that are either whole or refused. No pickle.

A folder holds one ``<name>.safetensors`` per group of tensors, ``state.json``, and ``manifest.json`` with the size and
sha256 of each of them and of itself. It is written aside, as ``<folder>.tmp-<random>``; every file reaches the disk,
the manifest last; then the folder takes its name. What has its name is therefore whole, whenever the process died.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyvoice.errors import CheckpointError, UsageError
from manyvoice.train.durable import beside, hash_of, place, rename, sync, writing

JSON: TypeAlias = "None | bool | int | float | str | Sequence[JSON] | Mapping[str, JSON]"
OnPhase: TypeAlias = Callable[[str], None]
Entries: TypeAlias = dict[str, tuple[int, str]]  # file -> bytes, sha256

FORMAT = "manyvoice.checkpoint.v1"
MANIFEST, STATE = "manifest.json", "state.json"
KEPT = "kept"  # where a Keeper notes step and metric in the state

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_STEP = re.compile(r"step-(\d{8,})")
_ASIDE = re.compile(r"(step-\d{8,})\.(tmp|old|gone)-[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What was saved: tensors by file and name, on the CPU, and the state."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A checkpoint of a Keeper; the metric is better when lower, None if there was none.

    ``passing`` ones only bridge a stop: they take no place among the last, and go when the next one is there.
    """

    step: int
    path: Path
    metric: float | None
    passing: bool = False


def save(
    folder: Path,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
    on_phase: OnPhase | None = None,
) -> None:
    """Write a checkpoint that appears under its name only when all of it is on the disk; replaces an older one.

    Args:
        tensors: file name without ending -> tensor name -> tensor of any device; shared storage is stored twice.
        state: what JSON can hold; tuples come back as lists.
        on_phase: told after each phase: "aside", "FILE written", "FILE synced", "ready", "moved", "placed", "done".
    Raises: CheckpointError if it cannot be written, with the space left; earlier checkpoints are then untouched.
    """
    tell = on_phase or (lambda phase: None)
    _check_names(tensors)
    _check_json(state, "state")
    aside = beside(folder, "tmp")
    with writing(f"write {folder}", folder, aside):
        if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
            raise CheckpointError(f"{folder} is not a checkpoint and will not be overwritten; choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        tell("aside")
        entries: Entries = {}
        for name, group in tensors.items():
            entries |= _put(aside / f"{name}.safetensors", partial(_write_tensors, tensors=group), tell)
        entries |= _put(aside / STATE, partial(_write_bytes, data=_canonical(state)), tell)
        _put(aside / MANIFEST, partial(_write_bytes, data=_manifest(entries)), tell)
        sync(aside)
        tell("ready")
        place(aside, folder, tell)
        tell("done")


def load(folder: Path) -> Loaded:
    """Read a checkpoint after verifying every byte of it.

    Raises: CheckpointError naming the file and what is wrong: missing, unknown, damaged, of another format version.
    """
    verify(folder)
    names = sorted(path.stem for path in folder.glob("*.safetensors"))
    return Loaded(tensors={name: _read_tensors(folder, name) for name in names}, state=_read_state(folder))


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest; nothing is parsed before its hash holds.

    Raises: CheckpointError naming the file and what is wrong.
    """
    for name, (_, sha256) in _check_manifest(folder).items():
        _check_hash(folder / name, sha256)


def average(folders: Sequence[Path], file: str = "model") -> dict[str, Tensor]:
    """The mean of each tensor over several checkpoints, summed in float64; integer tensors come from the last.

    Raises: CheckpointError if one is damaged, or names, shapes or types differ.
    """
    if not folders:
        raise UsageError("there is nothing to average; name at least one checkpoint")
    total: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    for folder in folders:
        verify(folder)
        this = _read_tensors(folder, file)
        if last:
            _check_alike(folder, this, last)
        for name, x in this.items():
            if x.is_floating_point() or x.is_complex():
                wide = x.to(torch.complex128 if x.is_complex() else torch.float64)
                total[name] = total[name].add_(wide) if name in total else wide
        last = this
    return {name: (total[name] / len(folders)).to(x.dtype) if name in total else x for name, x in last.items()}


@final
class Keeper:
    """The checkpoints of one run, ``step-00001000`` and so on: the last few, the best few, nothing half written.

    A checkpoint saved at a step before some that are there starts another history (a run resumed from an earlier one):
    those after it are first renamed to ``abandoned-step-...``, which are never listed, loaded or deleted.

    Args:
        last: how many of the newest to keep.  best: how many of the lowest metric to keep besides.
        writer: one process per folder; the others read only and leave what is being written alone.
    Raises: CheckpointError if the folder cannot be made or swept.
    """

    def __init__(self, folder: Path, *, last: int, best: int = 0, writer: bool = True):
        if last < 1 or best < 0:
            raise UsageError(f"keep at least the last 1 and the best 0 checkpoints, not last {last} and best {best}")
        self.folder = folder
        self._last, self._best, self._writer = last, best, writer
        if writer:
            with writing(f"use {folder}", folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._sweep()

    def save(
        self,
        step: int,
        metric: float | None = None,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, JSON],
        passing: bool = False,
        on_phase: OnPhase | None = None,
    ) -> Kept:
        """Write the checkpoint of a step, then delete those that are neither among the last nor among the best.

        Args: metric: lower is better; None and what is not finite is never among the best.  passing: only bridges a
            stop, so that a run that was stopped keeps what one that was not keeps.
        Raises: CheckpointError if it cannot be written or another cannot be deleted.
        """
        if not self._writer:
            raise UsageError(f"this Keeper of {self.folder} only reads; save from the process that writes")
        if step < 0 or KEPT in state:
            raise UsageError(f"step must be 0 or more, but is {step}, and the state must leave {KEPT!r} to the Keeper")
        path = self.folder / f"step-{step:08d}"
        with writing(f"make way for {path}", self.folder):
            for old in self._paths():
                if _step_of(old) > step or (old == path and not (old / MANIFEST).exists()):
                    rename(old, beside(self.folder / f"abandoned-{old.name}", "at"))
        kept: JSON = {"step": step, "metric": metric} | ({"passing": True} if passing else {})
        save(path, tensors=tensors, state={**state, KEPT: kept}, on_phase=on_phase)
        with writing(f"delete what {path}, which is saved, replaces", self.folder):
            self._trim(on_phase or (lambda phase: None))
        return Kept(step=step, path=path, metric=metric, passing=passing)

    def list(self) -> tuple[Kept, ...]:
        """Checkpoints by step whose manifest and state are sound; loading one verifies the rest of it."""
        return tuple(kept for kept in map(_kept, self._paths()) if kept is not None)

    def best(self) -> Kept | None:
        """The checkpoint of the lowest metric, the later of two equal ones; None if none has a finite metric."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def newest(self) -> Kept | None:
        """The last checkpoint, every byte verified; None if there is none at all.

        Raises: CheckpointError if it is damaged, naming it and the newest whole one before it.
        """
        first: CheckpointError | None = None
        for path in reversed(self._paths()):
            try:
                verify(path)
                kept = _read_kept(path)
            except CheckpointError as damage:
                first = first or damage
                continue
            if first is None:
                return kept
            way_out = f"{path.name} before it is whole: resume with --from {path.name}"
            raise CheckpointError(f"{first}; {way_out}") from first
        if first is not None:
            raise CheckpointError(f"{first}; none before it is whole: start the run anew") from first
        return None

    def _paths(self) -> Sequence[Path]:
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if p.is_dir() and _STEP.fullmatch(p.name)), key=_step_of)

    def _ranked(self) -> Sequence[Kept]:
        scored = [k for k in self.list() if k.metric is not None and math.isfinite(k.metric)]
        return sorted(scored, key=lambda k: (k.metric, -k.step))

    def _trim(self, tell: OnPhase) -> None:
        # those that cannot be read take no place among the last and stay as they are, for whoever wants to look
        listed = self.list()
        lasting = [k for k in listed if not k.passing]
        keep = {k.step for k in (*listed[-1:], *lasting[-self._last :], *self._ranked()[: self._best])}
        for kept in (k for k in listed if k.step not in keep):
            tell(f"deleting {kept.path.name}")
            gone = beside(kept.path, "gone")
            rename(kept.path, gone)
            tell(f"moved {kept.path.name}")
            shutil.rmtree(gone)
            tell(f"deleted {kept.path.name}")

    def _sweep(self) -> None:
        """Put back a replaced checkpoint whose successor never came, delete what else a killed process left."""
        for path in sorted(self.folder.iterdir()):
            match = _ASIDE.fullmatch(path.name)
            if not match:
                continue
            target = self.folder / match[1]
            if match[2] == "old" and not target.exists():
                rename(path, target)
            else:
                shutil.rmtree(path)


def _kept(path: Path) -> Kept | None:
    try:
        return _read_kept(path)
    except CheckpointError:
        return None


def _read_kept(path: Path) -> Kept:
    step, entry = _step_of(path), _read_state(path).get(KEPT)
    if not isinstance(entry, dict) or entry.get("step") != step:
        rule = f"{KEPT!r} is {entry!r}, but must tell of step {step}, as its folder does"
        raise CheckpointError(f"{path / STATE}: {rule}; give the folder the name that it was saved under")
    return Kept(step=step, path=path, metric=entry.get("metric"), passing=bool(entry.get("passing")))


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


# Writing


def _put(path: Path, write: Callable[[Path], None], tell: OnPhase) -> Entries:
    """Write one file through to the disk; its entry in the manifest."""
    write(path)
    tell(f"{path.name} written")
    sync(path)
    tell(f"{path.name} synced")
    return {path.name: (path.stat().st_size, hash_of(path))}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, x in tensors.items():
        if x.layout != torch.strided or x.is_meta:
            raise CheckpointError(
                f"{path.name}: tensor {name!r} is {x.layout} on {x.device}; only dense ones are stored"
            )
        here = x.detach().cpu().contiguous()
        pointer = here.untyped_storage().data_ptr()
        ready[name] = here.clone() if pointer in seen and pointer else here
        seen.add(pointer)
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(ready, path)
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(str(error)) from error
    path.chmod(mode)  # the library's own file would be readable by its owner only


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _check_names(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name in tensors:
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{name!r} cannot name a checkpoint file; use letters, digits, _ and -")


def _check_json(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}; JSON keys are strings")
            _check_json(inner, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            _check_json(inner, f"{where}[{i}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise CheckpointError(f"{where} is a {type(value).__name__}, which JSON cannot hold; tensors go into `tensors`")


def _canonical(value: object) -> bytes:
    # NaN and Infinity pass: a loss that is not finite is no reason to lose a checkpoint
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def _manifest(entries: Entries) -> bytes:
    files = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in entries.items()}
    content = {"format": FORMAT, "files": files}
    return _canonical(content | {"sha256": hashlib.sha256(_canonical(content)).hexdigest()})


# Reading


def _check_manifest(folder: Path) -> Entries:
    """The manifest's entries, after comparing names and sizes with what is there."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; a checkpoint is one, such as checkpoints/step-00001000")
    data = _read_bytes(path)
    try:
        content = dict(json.loads(data))
        found = content.get("format", "none")
        if found != FORMAT:
            raise CheckpointError(
                f"{path} has format {found!r}, but this version reads {FORMAT!r}; use the one that wrote it"
            )
        entries = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in content["files"].items()}
        sound = data == _manifest(entries)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}; use another checkpoint") from error
    if not sound:
        raise CheckpointError(f"{path} is damaged: its content does not match its own sha256; use another checkpoint")
    there = {p.name for p in folder.iterdir()} - {MANIFEST}
    for name in sorted(there ^ set(entries)):
        if name in there:
            raise CheckpointError(f"{folder / name} is not in {MANIFEST}; remove it if you know what it is")
        raise CheckpointError(f"{folder / name} is missing; use another checkpoint")
    for name, (size, _) in entries.items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file} is not an ordinary file; use another checkpoint")
        if file.stat().st_size != size:
            sizes = f"{file.stat().st_size} bytes, but {MANIFEST} says {size}"
            raise CheckpointError(f"{file} is damaged: it has {sizes}; use another checkpoint")
    return entries


def _check_hash(file: Path, sha256: str) -> None:
    try:
        found = hash_of(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}; use another checkpoint") from error
    if found != sha256:
        hashes = f"sha256 is {found[:12]}..., but {MANIFEST} says {sha256[:12]}..."
        raise CheckpointError(f"{file} is damaged: its {hashes}; use another checkpoint")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, so this checkpoint was never finished; use another one") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; use another checkpoint") from error


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    if not path.exists():
        raise CheckpointError(
            f"{path} is not in this checkpoint; it holds {sorted(p.stem for p in folder.glob('*.safetensors'))}"
        )
    try:
        # cloned, because loaded tensors are a view of the file, which may be deleted while they live
        return {key: x.clone() for key, x in load_file(path).items()}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}; use another checkpoint") from error


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    entries = _check_manifest(folder)
    if STATE not in entries:
        raise CheckpointError(f"{path} is missing; use another checkpoint")
    _check_hash(path, entries[STATE][1])
    try:
        state = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; use another checkpoint") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} must hold an object, but holds a {type(state).__name__}; use another checkpoint")
    return state


def _check_alike(folder: Path, this: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    for name in sorted(set(this) ^ set(other)):
        raise CheckpointError(
            f"{folder}: tensor {name!r} is not in all the checkpoints to average; average one run only"
        )
    for name, x in this.items():
        y = other[name]
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            has = f"{tuple(x.shape)} {x.dtype}, but {tuple(y.shape)} {y.dtype} in the one before it"
            raise CheckpointError(f"{folder}: tensor {name!r} is {has}; average one run only")
