"""Low-rank updates of linear maps (Hu et al., arXiv:2106.09685).

y + (alpha / R) (x A) B        B starts at zero
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from manyvoice.errors import UsageError
from manyvoice.models.anatomy import Anatomy, Site
from manyvoice.submodels.method import Edit, Part


@final
@dataclass(frozen=True, kw_only=True)
class Lora(Edit):
    """Args: rank: R.  alpha: scale; the update is multiplied by alpha / R.  roles: of the linear maps that it edits."""

    name: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 16.0
    roles: tuple[str, ...] = ("attention.query", "attention.value", "attention.out")

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise UsageError(f"lora.rank = {self.rank}, lora.alpha = {self.alpha}: both must be above 0; 8 and 16, say")

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """Linear maps of the roles asked for. UsageError for a role that the model does not have."""
        linear = [s for s in anatomy.sites if s.kind == "linear"]
        if unknown := sorted(set(self.roles) - {s.role for s in linear}):
            known = ", ".join(sorted({s.role for s in linear}))
            raise UsageError(f"lora.roles: this model has no {', '.join(unknown)}; it has {known}")
        return tuple(s for s in linear if s.role in self.roles)

    def parts(self, site: Site) -> dict[str, Part]:
        """R (I + O) numbers."""
        return {
            "A": Part(shape=(site.width_in, self.rank), start="normal", fan=site.width_in, reads=0),
            "B": Part(shape=(self.rank, site.width_out), writes=1),
        }

    def edit(self, tensors: Mapping[str, Tensor], x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        """See the formula above."""
        low_BTR = torch.bmm(x_BTI, tensors["A"])
        return torch.baddbmm(y_BTO, low_BTR, tensors["B"], alpha=self.alpha / self.rank)

    def merged(
        self, tensors: Mapping[str, Tensor], weight_OI: Tensor, bias_O: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """W + (alpha / R) (A B)^T; the bias stays."""
        return weight_OI + (self.alpha / self.rank) * (tensors["A"] @ tensors["B"]).T, bias_O


METHOD = Lora
