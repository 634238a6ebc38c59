"""Batch sizes that were measured, kept on disk: the same model on the same device need not be measured again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from manyvoice.data.cache import user_cache
from manyvoice.errors import UsageError

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@final
@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was measured, and for what.

    Args:
        key: everything that the sizes depend on, readable.
        bins: (seconds, tokens) of each bin.  sizes: utterances of each that fit.
        bytes_of: predicted of the process for each; empty where steps ran until one failed.
        how: in words.  confirmed: measured over predicted bytes of one real step.  seconds: that measuring took.
    """

    key: Mapping[str, Any]
    bins: Sequence[tuple[float, int]]
    sizes: Sequence[int]
    bytes_of: Sequence[int]
    how: str
    confirmed: float | None
    seconds: float

    @property
    def name(self) -> str:
        """Of its file."""
        return name_of(self.key)


def name_of(key: Mapping[str, Any]) -> str:
    """sha256 of a key, the first 16 digits."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def folder() -> Path:
    """``$MANYVOICE_CACHE/profiles``, or the user's cache folder."""
    return user_cache("profiles")


def find(key: Mapping[str, Any]) -> Profile | None:
    """The profile of exactly this key; a file that is damaged is as good as none."""
    path = folder() / f"{name_of(key)}.json"
    try:
        return check_fits(read(path), key)
    except (OSError, UsageError):
        return None


def store(profile: Profile) -> Path | None:
    """Remember it; returns its path, or None where the cache folder cannot be written."""
    path = folder() / f"{profile.name}.json"
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError:
        return None
    return path


def read(path: Path) -> Profile:
    """A profile's file. OSError if it cannot be read, UsageError if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        profile = Profile(**{**found, "bins": [(float(s), int(t)) for s, t in found["bins"]]})
        if len(profile.sizes) != len(profile.bins) or any(int(n) < 1 for n in profile.sizes):
            raise ValueError("sizes and bins do not go together")
        return profile
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path}: is no batch profile ({error}); delete it, and it is measured again") from error


def check_fits(profile: Profile, key: Mapping[str, Any]) -> Profile:
    """The profile, if it is of this model, optimiser, precision, device and limit. UsageError names what differs."""
    names = sorted({*profile.key, *key})
    odd = [n for n in names if profile.key.get(n) != key.get(n)]
    if odd:
        told = "; ".join(f"{n} is {key.get(n)!r:.60} but was {profile.key.get(n)!r:.60}" for n in odd)
        raise UsageError(f"this batch profile is of another training job ({told}); measure again with --again")
    return profile


def parse_bytes(text: str) -> int:
    """``8GiB``, ``500 MB`` or a number of bytes. UsageError for anything else."""
    stripped = text.strip().lower()
    number = stripped.rstrip("abcdefghijklmnopqrstuvwxyz").strip()
    unit = stripped[len(number) :].strip()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"memory {text!r}: must be an amount such as 8GiB or 500MB; give one")
    return size
