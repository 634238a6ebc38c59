"""A mixture of basis adapters: all voices share K of them, a voice says how much of each it takes.

    y + sum over k of a_k up_k relu(down_k norm(y) + bias_k) + c bias        a, c: the voice's own, at every site

Cheaper than generated weights: no weights are made for each utterance, the shared ones work on the whole batch. It can
be settled as one adapter of K times the rank. Weights start at zero and the basis does not, for the reason that
``methods/generated.py`` gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from manyvoice.errors import UsageError
from manyvoice.models.anatomy import Anatomy, Site
from manyvoice.submodels.method import Edit, Part, make_method


@final
@dataclass(frozen=True, kw_only=True)
class Mixture(Edit):
    """Args: basis: K.  rank: of each basis adapter."""

    name: ClassVar[str] = "mixture"
    basis: int = 8
    rank: int = 8

    def __post_init__(self) -> None:
        if self.basis < 1:
            raise UsageError(f"mixture.basis = {self.basis}: must be 1 or more; 8 is usual")
        self.alone()

    def alone(self) -> Edit:
        """An adapter of K times the rank."""
        return make_method("adapter", {"rank": self.basis * self.rank, "scale": 1.0})

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The adapter's."""
        return self.alone().sites(anatomy)

    def parts(self, site: Site) -> dict[str, Part]:
        """K numbers a voice at each site, and the basis, which is shared."""
        D, K, R = site.width_out, self.basis, self.basis * self.rank
        return {
            "weights": Part(shape=(K,)),
            "constant": Part(shape=(1,), start="ones"),
            "norm": Part(shape=(D,), scope="shared", start="ones", writes=0),
            "shift": Part(shape=(D,), scope="shared", writes=0),
            "down": Part(shape=(D, R), scope="shared", start="normal", fan=D, writes=0),
            "down_bias": Part(shape=(R,), scope="shared"),
            "up": Part(shape=(R, D), scope="shared", start="normal", fan=R, writes=1),
            "up_bias": Part(shape=(D,), scope="shared", writes=0),
        }

    def settled(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter of one voice: its weights are worked into the upward map."""
        shared = {name: t for name, t in tensors.items() if name not in ("weights", "constant")}
        taken_R = tensors["weights"].repeat_interleave(self.rank)
        return shared | {
            "up": tensors["up"] * taken_R[:, None],
            "up_bias": tensors["up_bias"] * tensors["constant"],
        }

    def edit(self, tensors: Mapping[str, Tensor], x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        """See the formula above."""
        normal = torch.nn.functional.layer_norm(y_BTO, y_BTO.shape[-1:]) * tensors["norm"] + tensors["shift"]
        hidden_BTR = (normal @ tensors["down"] + tensors["down_bias"]).relu()
        taken_B1R = tensors["weights"].repeat_interleave(self.rank, dim=-1)[:, None]
        more_BTO = (hidden_BTR * taken_B1R) @ tensors["up"]
        return y_BTO + more_BTO + tensors["up_bias"] * tensors["constant"][:, None]


METHOD = Mixture
