"""Gains and biases of linear maps, (IA)^3 with a shift (Liu et al., arXiv:2205.05638): y g + b, at first y."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from manyvoice.errors import UsageError
from manyvoice.models.anatomy import Anatomy, Site
from manyvoice.submodels.method import Edit, Part


@final
@dataclass(frozen=True, kw_only=True)
class Scale(Edit):
    """Args: roles: of the linear maps whose outputs it scales."""

    name: ClassVar[str] = "scale"
    roles: tuple[str, ...] = ("ff1.up", "ff2.up", "attention.key", "attention.value")

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """Linear maps of the roles asked for. UsageError for a role that the model does not have."""
        known = {s.role for s in anatomy.sites if s.kind == "linear"}
        if unknown := sorted(set(self.roles) - known):
            raise UsageError(f"scale.roles: this model has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return tuple(s for s in anatomy.sites if s.role in self.roles)

    def parts(self, site: Site) -> dict[str, Part]:
        """2 O numbers; the gain is kept as its difference from one."""
        return {"gain": Part(shape=(site.width_out,), writes=0), "bias": Part(shape=(site.width_out,), writes=0)}

    def edit(self, tensors: Mapping[str, Tensor], x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        """See the formula above."""
        return y_BTO + y_BTO * tensors["gain"][:, None] + tensors["bias"][:, None]

    def merged(
        self, tensors: Mapping[str, Tensor], weight_OI: Tensor, bias_O: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Rows of W times their gains, and a bias that is scaled and shifted."""
        gain_O = 1 + tensors["gain"]
        bias = tensors["bias"] if bias_O is None else bias_O * gain_O + tensors["bias"]
        return weight_OI * gain_O[:, None], bias


METHOD = Scale
