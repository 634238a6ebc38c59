"""Submodels that an embedding generates: a voice is E numbers, what turns them into weights is shared by all.

    w = g w0 + e P        e: E numbers of the voice, at first 0, g: one more, at first 1;
                          w0, P: shared, for every part of a site

The second scheme of Submodels (Biadsy et al., arXiv:2203.12559), whose paper says that it exists and not how; the form
is that of a hyper-network (Ha et al., arXiv:1609.09106). A new voice learns, or is predicted, e and g alone. The parts
are an adapter's (``methods/adapter.py``), so a generated voice can be settled as one and refined by itself.

e starts at zero and P does not: fresh voices are the base, and where a voice ends follows from its speech. Were e drawn
at random, most of what it becomes would be that draw, which nobody could predict from the speech.
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
class Generated(Edit):
    """Args: dim: E.  rank: of the adapters that come out."""

    name: ClassVar[str] = "generated"
    dim: int = 16
    rank: int = 16

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise UsageError(f"generated.dim = {self.dim}: must be 1 or more; 16 is usual")
        self.alone()

    def alone(self) -> Edit:
        """An adapter."""
        return make_method("adapter", {"rank": self.rank, "scale": 1.0})

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The adapter's."""
        return self.alone().sites(anatomy)

    def parts(self, site: Site) -> dict[str, Part]:
        """E + 1 numbers a voice; (E + 1) times an adapter's numbers shared at each site."""
        found = {
            "gain": Part(shape=(1,), scope="voice", start="ones"),
            "embedding": Part(shape=(self.dim,), scope="voice"),
        }
        for name, part in self.alone().parts(site).items():
            mean = Part(shape=part.shape, scope="shared", start=part.start, fan=part.fan, reads=part.reads,
                        writes=part.writes)  # fmt: skip
            found[f"{name}.mean"] = mean
            matrix = len(part.shape) > 1
            found[f"{name}.from"] = Part(
                shape=(self.dim, *part.shape),
                scope="shared",
                # gains and biases follow once the matrices have moved the embedding
                start="normal" if matrix else "zeros",
                fan=self.dim * (part.shape[0] if matrix else 1),
                reads=None if part.reads is None else part.reads + 1,
                writes=None if part.writes is None else part.writes + 1,
            )
        return found

    def settled(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter of one voice."""
        made = self._made({n: t[None] if n in ("gain", "embedding") else t for n, t in tensors.items()})
        return {name: t[0] for name, t in made.items()}

    def edit(self, tensors: Mapping[str, Tensor], x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        """The adapter's edit with what the embedding makes."""
        return self.alone().edit(self._made(tensors), x_BTI, y_BTO)

    def _made(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gain_B1, embedding_BE = tensors["gain"], tensors["embedding"]
        names = [name.removesuffix(".mean") for name in tensors if name.endswith(".mean")]
        return {
            name: torch.tensordot(gain_B1, tensors[f"{name}.mean"][None], 1)
            + torch.tensordot(embedding_BE, tensors[f"{name}.from"], 1)
            for name in names
        }


METHOD = Generated
