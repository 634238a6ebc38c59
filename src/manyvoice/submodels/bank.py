"""A bank: submodels of one method, stacked on a leading axis; a batch says which row each utterance belongs to.

One submodel is a bank of one; training thousands together is a bank with gradients; mixed inference is the same call
without. Row 0 is the identity and is never trained.

    S  rows, the identity included   B  utterances   T  frames   I, O  input and output width
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from manyvoice.errors import ModelError, UsageError
from manyvoice.models.anatomy import Anatomy, Site, family_of
from manyvoice.submodels.method import Edit, Part


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


@final
class Bank:
    """Submodels of one method for one base.

    Args:
        anatomy: of the whole base model.
        owners: a name for each row after the identity.  A row's start follows from (seed, its name) alone, so it is the
            same in a bank of any size.
        dtype, device: of all tensors.
    Attributes: tensors: S times a part's shape, by (site key, part).
    Raises: UsageError if two owners have one name or there is none.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        method: Edit,
        owners: Sequence[str],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not owners or len(set(owners)) < len(owners):
            raise UsageError(f"a bank wants one name for each owner, no two the same, but got {len(owners)} owners")
        self.method, self.owners, self.seed = method, tuple(owners), seed
        self.sites = {site.key: site for site in method.sites(anatomy)}
        if not self.sites:
            raise ModelError(f"method {method.name} finds no site in this model; give it roles that the model has")
        self.parts: dict[tuple[str, str], Part] = {
            (key, name): part for key, site in self.sites.items() for name, part in method.parts(site).items()
        }
        self.tensors: dict[tuple[str, str], nn.Parameter] = {}
        for where, part in self.parts.items():
            rows = [_identity(part, dtype)] + [self._start(where, part, owner).to(dtype) for owner in owners]
            self.tensors[where] = nn.Parameter(torch.stack(rows).to(device))

    def _start(self, where: tuple[str, str], part: Part, owner: str) -> Tensor:
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
            return 1 + self.owners.index(owner)
        except ValueError:
            some = ", ".join(self.owners[:5])
            raise UsageError(f"no submodel {owner!r} in this bank of {len(self.owners)}, such as {some}") from None

    def parameters(self) -> list[nn.Parameter]:
        """All tensors."""
        return list(self.tensors.values())

    @property
    def bytes_per_owner(self) -> int:
        """Of one submodel."""
        return sum(p[0].numel() * p.element_size() for p in self.tensors.values())

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
        ran = Ran()
        with ExitStack() as hooks:
            for key, name in self._places(model, layers):
                hook = self._hook(key, owner_B, slices or {}, ran)
                hooks.enter_context(_hooked(model.get_submodule(name), hook))
            yield ran

    def _places(self, model: PreTrainedModel, layers: Sequence[int] | None) -> list[tuple[str, str]]:
        """Key and path of each of the bank's sites that the model has."""
        there = {_key(site, layers): site.name for site in family_of(model).anatomy(model).sites}
        found = [(key, there[key]) for key in self.sites if key in there]
        if not found:
            raise ModelError(
                f"none of this bank's {len(self.sites)} sites is in the model, such as {next(iter(self.sites))}; it "
                "was made for another base"
            )
        return found

    def _hook(self, key: str, owner_B: Tensor, slices: Slices, ran: Ran) -> Any:
        names = [name for where, name in self.parts if where == key]

        def edit(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            rows = {name: self._rows(key, name, owner_B, slices) for name in names}
            x = output if self.sites[key].kind == "stream" else inputs[0]
            ran.sites.add(key)
            return self.method.edit(rows, x, output)

        return edit

    def _rows(self, key: str, name: str, owner_B: Tensor, slices: Slices) -> Tensor:
        """B times the part's shape, as wide as the site is now."""
        tensor, part, site = self.tensors[key, name], self.parts[key, name], self.sites[key]
        rows = tensor.index_select(0, owner_B.to(tensor.device))
        for one in slices.get(f"{site.name}.weight", ()):
            # a linear map's weight is O I
            along = part.writes if one.dim == 0 else part.reads
            if along is not None:
                rows = torch.cat([rows.narrow(along + 1, a, b - a) for a, b in one.ranges], along + 1)
        return rows


def _key(site: Site, layers: Sequence[int] | None) -> str:
    return site.key if layers is None else f"{layers[site.layer]}.{site.role}"


def _identity(part: Part, dtype: torch.dtype) -> Tensor:
    return torch.full(part.shape, 1.0 if part.identity == "ones" else 0.0, dtype=dtype)


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
