"""A space of voices: what the submodels of a ``generated`` or ``mixture`` bank share, as a file that anybody can check.

One safetensors file, known by the sha256 of its bytes, with a digest of its contents inside. Besides the shared tensors
it has the mean and covariance of the training speakers' own numbers, from which new speakers start and which they are
drawn to, and what predicts those numbers from speech. Names and single speakers' numbers are not in it; that the
speakers shaped what is shared stays.

    E  numbers that are a voice's own   S  speakers
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from manyvoice.errors import UsageError, VoiceError
from manyvoice.models.anatomy import Anatomy
from manyvoice.submodels.bank import Bank, Where, parts_of
from manyvoice.submodels.method import Edit, make_method
from manyvoice.submodels.optim import RowAdamW
from manyvoice.submodels.places import LocalPlace
from manyvoice.submodels.predict import Predictor
from manyvoice.submodels.voice import Voice, digest_of_file

FORMAT, FILE = "generator.v1", "space.safetensors"
_ENTRY = "manyvoice"
_WAY_OUT = "copy it again from where it is whole, or train the space again with `manyvoice space`"

Floats = NDArray[np.float64]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Generator:
    """One space.

    Args:
        method: with its settings; one whose submodels share tensors.
        shared: by (site key, part).
        mean, covariance: of the training speakers' own numbers, E and E E, float64.
        base, tokenizer: fingerprints of the base model's weights and of its vocabulary.
        predictor: if one was fitted.
        card: what else is known: speakers, seconds of speech, rounds; plain JSON values.
    """

    method: Edit
    shared: Mapping[Where, Tensor]
    mean: Floats
    covariance: Floats
    base: str
    tokenizer: str
    predictor: Predictor | None = None
    card: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def data(self) -> bytes:
        """The file. VoiceError for numbers that are not finite."""
        document = {
            "format": FORMAT, "method": self.method.name, "settings": self.method.settings(), "base": self.base,
            "tokenizer": self.tokenizer, "card": dict(self.card),
            "predictor": None if self.predictor is None else self.predictor.card(),
        }  # fmt: skip
        tensors = {f"shared/{key}/{part}": t.detach().cpu().contiguous() for (key, part), t in self.shared.items()}
        tensors |= {"own/mean": torch.from_numpy(self.mean), "own/covariance": torch.from_numpy(self.covariance)}
        if self.predictor is not None:
            tensors |= {f"predictor/{name}": t for name, t in self.predictor.tensors().items()}
        _check_finite(tensors, "this space")
        document["digest"] = digest_of_file(document, tensors)
        return save(tensors, {_ENTRY: json.dumps(document, sort_keys=True, ensure_ascii=False)})

    @cached_property
    def hash(self) -> str:
        """sha256 of the file, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def axes(self) -> Floats:
        """E E, L with own = mean + z L': z are standard deviations of the training speakers, along axes of their own.

        L L' is the covariance, drawn to a multiple of the identity, the more the fewer speakers: by E / (E + S), our
        choice; with fewer speakers than numbers some would not vary at all.
        """
        E = len(self.mean)
        share = E / (E + float(self.card.get("speakers", 0)))
        even = np.eye(E) * max(self.spread**2, 1e-12)
        return np.asarray(np.linalg.cholesky((1 - share) * self.covariance + share * even), dtype=np.float64)

    def standard(self, own_PE: Tensor) -> Tensor:
        """z of own numbers, P E; gradients pass."""
        mean, axes = (torch.from_numpy(x).to(own_PE.device, own_PE.dtype) for x in (self.mean, self.axes))
        z_EP: Tensor = torch.linalg.solve_triangular(axes, (own_PE - mean).T, upper=False)
        return z_EP.T

    @property
    def spread(self) -> float:
        """Standard deviation of a number over the speakers, on average (root of the mean variance)."""
        return math.sqrt(max(float(np.trace(self.covariance)) / len(self.mean), 0.0))

    def bank(
        self, anatomy: Anatomy, owners: Sequence[str], *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> Bank:
        """A bank of this space, every owner at the mean; what is shared is frozen."""
        bank = Bank(anatomy, self.method, owners, empty=True, dtype=dtype, device=device)
        for where, p in bank.shared.items():
            p.data.copy_(self.shared[where])
            p.requires_grad_(False)
        for row in range(1, len(bank)):
            self.place(bank, row, self.mean)
        return bank

    def place(self, bank: Bank, row: int, own: Floats) -> None:
        """Give a row of such a bank its own numbers, E. VoiceError if they are not finite, or not so many."""
        if own.shape != self.mean.shape or not np.isfinite(own).all():
            raise VoiceError(
                f"a voice of this space is {len(self.mean)} finite numbers, but got {own.shape} with "
                f"{int((~np.isfinite(own)).sum())} that are not finite"
            )
        shapes = {where: tuple(p.shape[1:]) for where, p in bank.tensors.items()}
        pieces = np.split(own, np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1])
        bank.put(row, {w: torch.from_numpy(v.reshape(shapes[w])) for w, v in zip(shapes, pieces, strict=True)})

    def voice(self, bank: Bank, row: int, card: Mapping[str, Any]) -> Voice:
        """A row of such a bank as a voice that stands by itself; its card says that it came from this space."""
        said = {**card, "space": self.hash, "shared": True}
        return Voice(
            method=self.method.alone(), tensors=bank.take(row), base=self.base, tokenizer=self.tokenizer, card=said
        )

    def check(self, anatomy: Anatomy, *, base: str, tokenizer: str) -> Generator:
        """The space, if it was made for that model. VoiceError names what does not fit."""
        name = f"space {self.hash[:12]}"
        if self.base != base:
            raise VoiceError(
                f"{name} was made for the base {self.base[:12]}, but this model is {base[:12]}; use that base, or "
                "train a space for this one with `manyvoice space`"
            )
        if self.tokenizer != tokenizer:
            raise VoiceError(
                f"{name} was made for the tokenizer {self.tokenizer[:12]}, but this model has {tokenizer[:12]}; use "
                "the folder that it was made with"
            )
        parts = parts_of(self.method, self.method.sites(anatomy))
        expected = {where: part.shape for where, part in parts.items() if part.scope == "shared"}
        found = {where: tuple(t.shape) for where, t in self.shared.items()}
        if found != expected:
            wrong = sorted(set(found.items()) ^ set(expected.items()))[0]
            raise VoiceError(f"{name} does not fit the model at {wrong[0]}, {list(wrong[1])}; {_WAY_OUT}")
        E = sum(math.prod(part.shape) for part in parts.values() if part.scope != "shared")
        shapes = [self.mean.shape, self.covariance.shape]
        if self.predictor is not None:
            shapes.append(self.predictor.mean.shape)
        if shapes != [(E,), (E, E), (E,)][: len(shapes)]:
            raise VoiceError(f"{name}: a voice is {E} numbers, but it has statistics of {shapes}; {_WAY_OUT}")
        return self

    @classmethod
    def read(cls, path: Path) -> Generator:
        """A space from its file, or from the folder that a training run wrote.

        Raises: VoiceError for a file that is missing, truncated, changed, foreign, of another version or not finite.
        """
        path = path / FILE if path.is_dir() else path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise VoiceError(
                f"{path}: cannot be read ({error}); give the folder that `manyvoice space` wrote"
            ) from error
        document = _document(data, path)
        try:
            stored = load(data)
            if document.pop("digest") != digest_of_file(document, stored):
                raise VoiceError(f"{path}: was changed since it was written; {_WAY_OUT}")
            parts: dict[str, dict[str, Tensor]] = {"shared": {}, "own": {}, "predictor": {}}
            for name, tensor in stored.items():
                kind, _, rest = name.partition("/")
                parts[kind][rest] = tensor
            said = document["predictor"]
            found = cls(
                method=make_method(document["method"], document["settings"]),
                shared={_where(name): t for name, t in parts["shared"].items()},
                mean=parts["own"]["mean"].double().numpy(), covariance=parts["own"]["covariance"].double().numpy(),
                base=document["base"], tokenizer=document["tokenizer"], card=document["card"],
                predictor=None if said is None else Predictor.stored(said, parts["predictor"]),
            )  # fmt: skip
        except (SafetensorError, KeyError, TypeError, ValueError, UsageError) as error:
            raise VoiceError(f"{path}: is no space that this version can read ({error}); {_WAY_OUT}") from error
        _check_finite(stored, str(path))
        # what was read is what its hash is of, not how it would be written now
        found.__dict__["data"] = data
        return found

    def write(self, folder: Path) -> Path:
        """``space.safetensors`` in a folder, whole or not there."""
        path = folder / FILE
        try:
            LocalPlace(folder).write(FILE, self.data)
        except OSError as error:
            raise VoiceError(f"{path}: cannot be written ({error}); make room or choose another place") from error
        return path


@final
class SpaceAdamW:
    """Steps of a space's bank in standard deviations of the training speakers: as ``RowAdamW``, but of z.

    Numbers that hardly differ between speakers then move as little, and those that differ most move most.

    Args: lr: in standard deviations.
    """

    def __init__(self, generator: Generator, bank: Bank, lr: float) -> None:
        self.bank = bank
        self.z = torch.nn.Parameter(generator.standard(own_of(bank, range(len(bank))).detach()))
        self.mean, self.axes = (
            torch.from_numpy(x).to(self.z.device, self.z.dtype) for x in (generator.mean, generator.axes)
        )
        self.rows = RowAdamW([self.z], lr, clip=None)

    @torch.no_grad()
    def step_rows(self, rows_P: Tensor, grads: Sequence[Tensor], *, scale: float = 1.0) -> None:
        """Move the rows by gradients of their own numbers, one for each tensor of the bank."""
        grad_PE = torch.cat([g.flatten(1) for g in grads], dim=1)
        self.rows.step_rows(rows_P, [grad_PE @ self.axes], scale=scale)
        own_PE = self.mean + self.z[rows_P] @ self.axes.T
        tensors = self.bank.parameters()
        for p, part in zip(tensors, own_PE.split([p[0].numel() for p in tensors], dim=1), strict=True):
            p[rows_P] = part.view(-1, *p.shape[1:])

    def state(self) -> dict[str, Tensor]:
        """As ``RowAdamW`` has it, and z."""
        return self.rows.state() | {"z": self.z}


def own_of(bank: Bank, rows: Sequence[int] | None = None) -> Tensor:
    """The own numbers of rows of a bank, or of all but the identity, S E; gradients pass."""
    wanted = list(range(1, len(bank))) if rows is None else list(rows)
    return torch.cat([p[wanted].flatten(1) for p in bank.tensors.values()], dim=1)


def generator_of(
    bank: Bank, own_SE: Floats, *, base: str, tokenizer: str, predictor: Predictor | None = None,
    card: Mapping[str, Any] | None = None,
) -> Generator:  # fmt: skip
    """The space of a trained bank. UsageError for a bank that shares nothing.

    Args: own_SE: of all speakers, which may be more than the bank's where several processes trained.
    """
    if not bank.shared:
        raise UsageError(f"method {bank.method.name}: its voices share nothing, so they have no space; take generated")
    centred = own_SE - own_SE.mean(0)
    return Generator(
        method=bank.method, shared={where: p.detach().clone() for where, p in bank.shared.items()},
        mean=own_SE.mean(0), covariance=centred.T @ centred / max(1, len(own_SE) - 1), base=base, tokenizer=tokenizer,
        predictor=predictor, card={**(card or {}), "speakers": len(own_SE)},
    )  # fmt: skip


def _where(name: str) -> Where:
    key, _, part = name.rpartition("/")
    return key, part


def _document(data: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        document: dict[str, Any] = json.loads(header["__metadata__"][_ENTRY])
        version = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise VoiceError(f"{path}: is no space, or not written to its end; {_WAY_OUT}") from error
    if version != FORMAT:
        raise VoiceError(f"{path}: format {version!r}, but this version reads {FORMAT}; {_WAY_OUT}")
    return document


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise VoiceError(f"{where}: {name} holds numbers that are not finite; train it again, more slowly")
