"""What a model, or a part of it, costs: parameters and multiply-accumulates, from its anatomy."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from manyvoice.models.anatomy import Anatomy, Component, Cost, Family, parameter_count
from manyvoice.types import Frames, Seconds

# Costs of utterances are told for this much audio.
AUDIO: Seconds = Seconds(10.0)
# Feature frames come every 10 ms in all families here.
HOP: Seconds = Seconds(0.010)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one model costs.

    Args: parameters: of all of it.  layer_macs: of the encoder's layers, for ``AUDIO``.  macs: of all of it, the front
        end and the head included; no subnet makes those two smaller.
    """

    parameters: int
    layer_macs: float
    macs: float


def cost_of(
    model: PreTrainedModel, family: Family, kept: Collection[str] | None = None, anatomy: Anatomy | None = None
) -> Costs:
    """Costs of a model, or of it with the named components only; see :func:`layers_cost`."""
    anatomy = anatomy or family.anatomy(model)
    T = family.encoder_frames(model, Frames(round(AUDIO / HOP)))
    layers = layers_cost(model, anatomy, kept)
    rest = anatomy.front + anatomy.head
    return Costs(
        parameters=layers.parameters + rest.parameters,
        layer_macs=layers.macs(T),
        macs=layers.macs(T) + rest.macs(T),
    )


def layers_cost(model: nn.Module, anatomy: Anatomy, kept: Collection[str] | None = None) -> Cost:
    """Cost of the encoder's layers, or of those of their components that are kept.

    A part of which no unit is left is gone as a whole, biases that belong to no unit included, as in narrowing.
    """
    names = {c.name for c in anatomy.components} if kept is None else kept
    total = Cost()
    for layer, components in by_layer(anatomy):
        whole = next(c for c in components if c.kind == "layer")
        if whole.name not in names:
            continue
        total += whole.cost
        for part, units in by_part(components):
            here = [c for c in units if c.name in names]
            total = sum((c.cost for c in here), total)
            if part and not here:
                module = model.get_submodule(f"{anatomy.layers}.{layer}.{part}")
                total += Cost(sum(c.cost.parameters for c in units) - parameter_count(module))
    return total


def by_layer(anatomy: Anatomy) -> Iterator[tuple[int, list[Component]]]:
    """Components of each layer, in order."""
    layers: dict[int, list[Component]] = {i: [] for i in range(anatomy.depth)}
    for c in anatomy.components:
        layers[c.layer].append(c)
    yield from layers.items()


def by_part(components: Collection[Component]) -> Iterator[tuple[str, list[Component]]]:
    """Units of a layer that live in one module and are of one kind; the layer itself is left out."""
    groups: dict[tuple[str, str], list[Component]] = {}
    for c in components:
        if c.kind != "layer":
            groups.setdefault((c.part, c.kind), []).append(c)
    for (part, _), units in groups.items():
        yield part, units
