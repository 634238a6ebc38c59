"""A bank: submodels of one method, stacked on a leading axis; a batch says which row each utterance belongs to.

One submodel is a bank of one; training thousands together is a bank with gradients; mixed inference is the same call
without. Row 0 is the identity and is never trained.

    S  rows, the identity included   B  utterances   T  frames   I, O  input and output width
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from manyvoice.errors import ModelError, UsageError, VoiceError
from manyvoice.models.anatomy import Anatomy, Site, family_of
from manyvoice.submodels.method import Edit, Part

# site key and name of a part; the key is empty for a part that a submodel has once for all sites
Where = tuple[str, str]


class Ranges(Protocol):
    """What a narrowed model keeps of a parameter along one dimension."""

    @property
    def dim(self) -> int: ...

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]: ...


# of parameters, by the whole model's names, as a subnet's plan has them
Slices = Mapping[str, Sequence[Ranges]]


@dataclass
class Ran:
    """Which sites a bank edited while it was on, by key: the first part of a receipt."""

    sites: set[str] = field(default_factory=set)


def bytes_per_row(anatomy: Anatomy, method: Edit, dtype: torch.dtype) -> int:
    """What one submodel takes in a bank of that type."""
    parts = parts_of(method, method.sites(anatomy)).values()
    return sum(math.prod(part.shape) for part in parts if part.scope != "shared") * dtype.itemsize


@final
class Bank:
    """Submodels of one method for one base.

    Args:
        anatomy: of the whole base model.
        owners: a name for each row after the identity.  A row's start follows from (seed, its name) alone, so it is the
            same in a bank of any size.
        empty: rows start as the identity, to be :meth:`put` later.
        dtype, device: of all tensors.
    Attributes:
        tensors: S times a part's shape, by (site key, part); the key is empty for a part that a voice has once.
        shared: of the part's shape alone, for parts that all submodels share.
    Raises: UsageError if two owners have one name or there is none.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        method: Edit,
        owners: Sequence[str],
        *,
        seed: int = 0,
        empty: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._row = {owner: k for k, owner in enumerate(owners, start=1)}
        if not owners or len(self._row) < len(owners):
            raise UsageError(f"a bank wants one name for each owner, no two the same, but got {len(owners)} owners")
        self.method, self.owners, self.seed = method, tuple(owners), seed
        self.sites = {site.key: site for site in method.sites(anatomy)}
        if not self.sites:
            raise ModelError(f"method {method.name} finds no site in this model; give it roles that the model has")
        self.parts = parts_of(method, self.sites.values())
        self._at = {key: _parts_at(self.parts, key) for key in self.sites}
        self.tensors: dict[Where, nn.Parameter] = {}
        self.shared: dict[Where, nn.Parameter] = {}
        for where, part in self.parts.items():
            if part.scope == "shared":
                self.shared[where] = nn.Parameter(self._start(where, part, "").to(device, dtype))
                continue
            stacked = _identity(part, dtype).repeat(1 + len(owners), *[1] * len(part.shape))
            for row, owner in enumerate(() if empty else owners, start=1):
                stacked[row] = self._start(where, part, owner)
            self.tensors[where] = nn.Parameter(stacked.to(device))

    def _start(self, where: Where, part: Part, owner: str) -> Tensor:
        if part.start == "normal":
            key = f"{self.seed} {owner} {where[0]} {where[1]}"
            digest = blake2b(key.encode(), digest_size=8, person=b"bank.v1").digest()
            gen = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            start: Tensor = torch.randn(part.shape, generator=gen, dtype=torch.float64) / math.sqrt(part.fan)
            return start
        return torch.full(part.shape, 1.0 if part.start == "ones" else 0.0, dtype=torch.float64)

    def __len__(self) -> int:
        """Rows, the identity included."""
        return 1 + len(self.owners)

    def row(self, owner: str) -> int:
        """An owner's row. UsageError names some that there are."""
        try:
            return self._row[owner]
        except KeyError:
            some = ", ".join(self.owners[:5])
            raise UsageError(f"no submodel {owner!r} in this bank of {len(self.owners)}, such as {some}") from None

    def parameters(self) -> list[nn.Parameter]:
        """All tensors with rows."""
        return list(self.tensors.values())

    def leaves(self, rows_P: Tensor) -> Bank:
        """A bank of these rows alone, in copies with gradients of their own: row 1 is the first of them.

        Gradients of a large bank would be as large as the bank; of this one they are as large as a step. What is shared
        is this bank's itself.
        """
        few = object.__new__(Bank)
        few.__dict__ |= self.__dict__
        few.owners = tuple(self.owners[int(r) - 1] for r in rows_P)
        few._row = {owner: k for k, owner in enumerate(few.owners, start=1)}
        rows_P = torch.cat([rows_P.new_zeros(1), rows_P])
        few.tensors = {where: nn.Parameter(p.detach()[rows_P]) for where, p in self.tensors.items()}
        return few

    @torch.no_grad()
    def take(self, row: int) -> dict[Where, Tensor]:
        """A copy of one row, as a submodel of ``method.alone()``: what is shared is worked into it."""
        if not self.shared:
            return {where: p[row].clone() for where, p in self.tensors.items()}
        found: dict[Where, Tensor] = {}
        for key in self.sites:
            one = {name: self._whole(key, name)[row] for name in self._at[key] if not self._is_shared(key, name)}
            one |= {name: self.shared[key, name] for name in self._at[key] if self._is_shared(key, name)}
            found |= {(key, name): t.clone() for name, t in self.method.settled(one).items()}
        return found

    @torch.no_grad()
    def put(self, row: int, tensors: Mapping[Where, Tensor]) -> None:
        """Replace one row. VoiceError for tensors of other names or shapes than this bank's."""
        expected = {where: tuple(p.shape[1:]) for where, p in self.tensors.items()}
        if {where: tuple(t.shape) for where, t in tensors.items()} != expected:
            raise VoiceError(
                f"a submodel of {len(tensors)} tensors does not fit this bank of {self.method.name} with "
                f"{len(expected)}; it was made with other settings or for another base"
            )
        places = [p.detach()[row] for p in self.tensors.values()]
        # one call for all: a submodel of a deep model has a hundred small tensors, and somebody waits for them
        torch._foreach_copy_(places, [tensors[where] for where in self.tensors])

    @contextmanager
    def on(
        self,
        model: PreTrainedModel,
        owner_B: Tensor,
        *,
        layers: Sequence[int] | None = None,
        slices: Slices | None = None,
    ) -> Iterator[Ran]:
        """Inside, every utterance of a batch runs with the submodel of its row; several banks may be on at once.

        Args:
            owner_B: int64, a row for each utterance; 0 is the bare base.
            layers: the original index of each of the model's layers, for an extracted model.
            slices: what a subnet keeps of the whole model's parameters, where the sites are narrowed.
        Raises: UsageError for a row that there is not; ModelError if no site of the bank is in the model.
        """
        if int(owner_B.min()) < 0 or int(owner_B.max()) >= len(self):
            raise UsageError(f"owner rows are 0 to {len(self) - 1} in this bank, but got {owner_B.tolist()[:8]}")

        def tensors(key: str) -> dict[str, Tensor]:
            found = {}
            for name in self._at[key]:
                where = self._place(key, name)
                shared = where in self.shared
                found[name] = self.shared[where] if shared else self.tensors[where].index_select(0, owner_B)
            return found

        owner_B = owner_B.to(next(iter(self.tensors.values())).device)
        with edited(model, self.method, self.sites, tensors, layers=layers, slices=slices) as ran:
            yield ran

    def _place(self, key: str, name: str) -> Where:
        return (key, name) if (key, name) in self.parts else ("", name)

    def _whole(self, key: str, name: str) -> Tensor:
        return self.tensors[self._place(key, name)]

    def _is_shared(self, key: str, name: str) -> bool:
        return (key, name) in self.shared


@contextmanager
def edited(
    model: PreTrainedModel,
    method: Edit,
    sites: Mapping[str, Site],
    tensors: Any,
    *,
    layers: Sequence[int] | None = None,
    slices: Slices | None = None,
) -> Iterator[Ran]:
    """Inside, the model's sites are edited by tensors from anywhere; :meth:`Bank.on` is the usual way.

    What another thread runs on the model meanwhile is not edited.

    Args: tensors: from a site's key to what ``method.edit`` wants there, of the whole site's width; called whenever the
        site runs.  layers, slices: as in :meth:`Bank.on`.
    Raises: ModelError if the model has none of the sites.
    """
    ran, mine = Ran(), threading.get_ident()
    with ExitStack() as hooks:
        for key, name in _places(model, sites, layers):
            site = sites[key]
            parts = method.parts(site)

            def hook(
                module: nn.Module,
                inputs: tuple[Any, ...],
                output: Any,
                key: str = key,
                site: Site = site,
                parts: Mapping[str, Part] = parts,
            ) -> Any:
                if threading.get_ident() != mine:
                    return output
                here = {name: _narrow(t, parts[name], site, slices or {}) for name, t in tensors(key).items()}
                ran.sites.add(key)
                return method.edit(here, output if site.kind == "stream" else inputs[0], output)

            hooks.enter_context(_hooked(model.get_submodule(name), hook))
        yield ran


def parts_of(method: Edit, sites: Iterable[Site]) -> dict[Where, Part]:
    """All parts of a method at these sites; one that a voice has once stands under an empty key."""
    return {
        ("" if part.scope == "voice" else site.key, name): part
        for site in sites
        for name, part in method.parts(site).items()
    }


def _parts_at(parts: Iterable[Where], key: str) -> list[str]:
    return [name for k, name in parts if k in ("", key)]


def _places(model: PreTrainedModel, sites: Mapping[str, Site], layers: Sequence[int] | None) -> list[tuple[str, str]]:
    """Key and path of each of the sites that the model has."""
    there = {_key(site, layers): site.name for site in family_of(model).anatomy(model).sites}
    found = [(key, there[key]) for key in sites if key in there]
    if not found:
        raise ModelError(
            f"none of this bank's {len(sites)} sites is in the model, such as {next(iter(sites))}; it was made for "
            "another base"
        )
    return found


def _narrow(x: Tensor, part: Part, site: Site, slices: Slices) -> Tensor:
    """As wide as the site is now."""
    rows = 0 if part.scope == "shared" else 1
    for one in slices.get(f"{site.name}.weight", ()):
        # a linear map's weight is O I
        along = part.writes if one.dim == 0 else part.reads
        if along is not None:
            x = torch.cat([x.narrow(along + rows, a, b - a) for a, b in one.ranges], along + rows)
    return x


def _key(site: Site, layers: Sequence[int] | None) -> str:
    return site.key if layers is None else f"{layers[site.layer]}.{site.role}"


def _identity(part: Part, dtype: torch.dtype) -> Tensor:
    return torch.full((1, *part.shape), 1.0 if part.identity == "ones" else 0.0, dtype=dtype)


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
