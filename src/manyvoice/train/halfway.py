"""Where a long job of owners stood, in one file that is whole or not there; the same job goes on from it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from manyvoice.errors import WorkError
from manyvoice.train.durable import beside, rename, sync
from manyvoice.types import Seconds


@final
class Halfway:
    """One file of tensors and what is to be said about them.

    Args:
        path: of the file.  key: names the job; what another job has left is as good as nothing.
        pause: at least so long between two writings.

    Raises: WorkError if the file cannot be written.
    """

    def __init__(self, path: Path, key: str, *, pause: Seconds = Seconds(60.0)) -> None:
        self.path, self.key, self.pause = path, key, pause
        self._written = time.monotonic()

    def due(self) -> bool:
        """Whether the last writing is long enough ago."""
        return time.monotonic() - self._written >= self.pause

    def there(self) -> bool:
        """Whether this job has left something."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return bool((file.metadata() or {}).get("key") == self.key)
        except (OSError, SafetensorError):
            return False

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and words; None where there is nothing, nothing whole, or something of another job."""
        try:
            with safe_open(self.path, framework="pt") as file:
                told = file.metadata() or {}
                if told.get("key") != self.key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                return tensors, json.loads(told["words"])
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def write(self, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
        """In place of what was there."""
        aside = beside(self.path, "new")
        whole = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(whole, str(aside), metadata={"key": self.key, "words": json.dumps(words)})
            sync(aside)
            rename(aside, self.path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise WorkError(f"{self.path}: cannot be written ({error}); make room and run the same again") from error
        self._written = time.monotonic()

    def remove(self) -> None:
        """Forget; what was there may hold voices, which belong into a store alone."""
        with suppress(OSError):
            for path in (self.path, *self.path.parent.glob(f"{self.path.name}.new-*")):
                path.unlink(missing_ok=True)


def halfway_of(folder: Path, rank: int) -> Path:
    """The file of one process of a job in this folder."""
    return folder / f"halfway-{rank}.safetensors"


def forget_all(folder: Path) -> None:
    """Remove what any process has left here, also one of an earlier start that had more of them."""
    with suppress(OSError):
        for path in folder.glob("halfway-*.safetensors*"):
            path.unlink(missing_ok=True)


def digest_of(*parts: object) -> str:
    """A job's key, from whatever its outcome depends on."""
    return blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()


def fits(into: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    """Whether names and shapes are the same."""
    return {name: t.shape for name, t in into.items()} == {name: t.shape for name, t in found.items()}


@torch.no_grad()
def restore(into: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Copy what :func:`fits` into the tensors of the same names."""
    for name, t in into.items():
        t.copy_(found[name])
