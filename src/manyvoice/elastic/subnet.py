"""A subnet: which components of a model are kept. Readable, comparable, and free of any tensor."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyvoice.errors import ModelError
from manyvoice.models.anatomy import Anatomy, ComponentKind
from manyvoice.models.cost import by_layer, by_part

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Subnet:
    """The components of a supernet that are kept; a layer's other components count only if the layer itself is kept.

    Args: name: what people call it.  kept: names of components, as the anatomy has them.
    """

    name: str
    kept: frozenset[str]

    def __contains__(self, other: object) -> bool:
        """Whether another subnet keeps nothing that this one lacks."""
        return isinstance(other, Subnet) and other.kept <= self.kept

    def check(self, anatomy: Anatomy) -> Subnet:
        """The subnet, if it is one of that anatomy. ModelError says what does not fit and what would."""
        known = {c.name for c in anatomy.components}
        if unknown := sorted(self.kept - known):
            raise ModelError(
                f"subnet {self.name!r} keeps {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}, which this "
                f"model does not have; it has {anatomy.depth} layers with components such as {_some(known)}: take the "
                "supernet that the subnet was made for, or make another"
            )
        layers = self.layers(anatomy)
        if not layers:
            raise ModelError(f"subnet {self.name!r} keeps no layer; keep one at least, such as 'layers.0'")
        stray = sorted(c.name for c in anatomy.components if c.name in self.kept and c.layer not in layers)
        if stray:
            raise ModelError(
                f"subnet {self.name!r} keeps {', '.join(stray[:5])} of layers that it drops; keep 'layers.N' as well"
            )
        return self

    def layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        """Original indices of the layers that are kept."""
        return tuple(c.layer for c in anatomy.components if c.kind == "layer" and c.name in self.kept)

    def to_json(self) -> dict[str, list[str]]:
        """Kept components by layer, the layer's own prefix left away."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.kept, key=_natural):
            _, layer, *rest = name.split(".", 2)
            units = found.setdefault(layer, [])
            units += rest
        return found


def whole(anatomy: Anatomy, name: str = "100") -> Subnet:
    """All of it."""
    return Subnet(name=name, kept=frozenset(c.name for c in anatomy.components))


def uniform(
    anatomy: Anatomy, name: str, layers: Collection[int], units: Mapping[ComponentKind, int] | None = None
) -> Subnet:
    """The first units of every part, equally many in all kept layers: such a subnet is a stock model.

    Args: units: how many of a kind to keep in each part; kinds that are not named stay whole.
    """
    kept: set[str] = set()
    for i, components in by_layer(anatomy):
        if i not in layers:
            continue
        kept.update(c.name for c in components if c.kind == "layer")
        for _, group in by_part(components):
            kept.update(c.name for c in group[: (units or {}).get(group[0].kind, len(group))])
    return Subnet(name=name, kept=frozenset(kept)).check(anatomy)


def write_subnet(path: Path, subnet: Subnet, *, supernet: str, more: Mapping[str, Any]) -> None:
    """A subnet as JSON, with the fingerprint of its supernet; written aside and renamed."""
    document = {"format": FORMAT, "name": subnet.name, "supernet": supernet, **more, "layers": subnet.to_json()}
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def read_subnet(path: Path, anatomy: Anatomy, *, supernet: str | None = None) -> tuple[Subnet, dict[str, Any]]:
    """A subnet of that anatomy from a file, and everything the file says.

    Args: supernet: fingerprint that the file must name.
    Raises: ModelError for a damaged file, one of another version, or of another supernet.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        kept = {f"layers.{i}" for i in document["layers"]}
        kept |= {f"layers.{i}.{unit}" for i, units in document["layers"].items() for unit in units}
        name, version, made_for = str(document["name"]), document["format"], document["supernet"]
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such subnet file; `manyvoice subnets MODEL ls` lists a model's sizes") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: is no subnet file ({error!r}); make it again with `manyvoice subnets`") from error
    if version != FORMAT:
        raise ModelError(f"{path}: format {version!r}, but this version reads {FORMAT}; make the subnet again")
    if supernet is not None and made_for != supernet:
        raise ModelError(
            f"{path}: is a subnet of the model {str(made_for)[:12]}, but this one is {supernet[:12]}; use the folder "
            "that the file came with, or make the sizes again"
        )
    return Subnet(name=name, kept=frozenset(kept)).check(anatomy), document


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names, key=_natural)[:4])
