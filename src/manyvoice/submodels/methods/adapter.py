"""Bottleneck residual adapters after every block (Houlsby et al., arXiv:1902.00751; Tomanek et al., arXiv:2109.06952).

    y + a (W_up relu(W_down norm(y) + b_down) + b_up)

Its norm is the submodel's own: one that submodels share would couple those that train together, and a stored submodel
would be incomplete without it. W_up and b_up start at zero, so a fresh submodel is the base. What starts at zero wants
larger steps than the rest (LoRA+, Hayou et al., arXiv:2402.12354): a, which is not learned, gives it them.
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
class Adapter(Edit):
    """Args: rank: width of the bottleneck.  scale: a."""

    name: ClassVar[str] = "adapter"
    rank: int = 16
    scale: float = 8.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.scale > 0:
            raise UsageError(
                f"adapter.rank = {self.rank}, adapter.scale = {self.scale}: both must be above 0; 16 and 8, say"
            )

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The residual stream after each block."""
        return tuple(s for s in anatomy.sites if s.kind == "stream")

    def parts(self, site: Site) -> dict[str, Part]:
        """2 D R + 3 D + R numbers."""
        D, R = site.width_out, self.rank
        return {
            "norm": Part(shape=(D,), start="ones", identity="ones", writes=0),
            "shift": Part(shape=(D,), writes=0),
            "down": Part(shape=(D, R), start="normal", fan=D, writes=0),
            "down_bias": Part(shape=(R,)),
            "up": Part(shape=(R, D), writes=1),
            "up_bias": Part(shape=(D,), writes=0),
        }

    def edit(self, tensors: Mapping[str, Tensor], x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        """See the formula above."""
        normal = torch.nn.functional.layer_norm(y_BTO, y_BTO.shape[-1:])
        normal = normal * tensors["norm"][:, None] + tensors["shift"][:, None]
        hidden_BTR = torch.baddbmm(tensors["down_bias"][:, None], normal, tensors["down"]).relu()
        return y_BTO + self.scale * torch.baddbmm(tensors["up_bias"][:, None], hidden_BTR, tensors["up"])


METHOD = Adapter
