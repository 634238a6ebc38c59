"""Run a model as one of its subnets: weights are sliced, and compute really shrinks.

While narrowed, a sliced tensor lies in its module's ``__dict__``, where Python finds it before the parameter of the
same name; what is dropped as a whole is exchanged for a stub, and the list of layers for a shorter one. Gradients flow
through the slices into the whole parameters. Afterwards everything is as it was.

    model.parameters() and state_dict() lack the dropped layers meanwhile: take such lists before.
    Recomputation of activation checkpoints must happen inside: run the backward pass there too.
    One subnet at a time for a model object, and no other thread may use it meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from manyvoice.elastic.subnet import Subnet
from manyvoice.errors import ModelError
from manyvoice.models.anatomy import Anatomy, Component, ComponentKind, family_of
from manyvoice.models.batchnorm import masked_norms
from manyvoice.models.cost import by_layer, by_part

Statistics = Mapping[str, Tensor]


@dataclass(frozen=True)
class Slice:
    """What is kept of one parameter along one dimension: ranges that do not touch each other."""

    dim: int
    ranges: tuple[tuple[int, int], ...]

    def of(self, x: Tensor) -> Tensor:
        """A view where the kept units lie together, else a copy with gradients."""
        parts = [x.narrow(self.dim, a, b - a) for a, b in self.ranges]
        if not parts:
            return x.narrow(self.dim, 0, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


@dataclass
class Plan:
    """Everything that a subnet changes.

    Args: slices: of parameters, by name.  dropped: paths of modules that are not there.  layers: kept, by original
        index.  counts: units kept of each part (path, kind): kept and in all.
    """

    layers: tuple[int, ...]
    slices: dict[str, list[Slice]] = field(default_factory=dict)
    dropped: dict[str, ComponentKind] = field(default_factory=dict)
    counts: dict[tuple[str, ComponentKind], tuple[int, int]] = field(default_factory=dict)


def plan_of(anatomy: Anatomy, subnet: Subnet) -> Plan:
    """What a subnet changes in a model of that anatomy. ModelError if it is not one of it."""
    subnet.check(anatomy)
    plan = Plan(layers=subnet.layers(anatomy))
    for i, components in by_layer(anatomy):
        if i not in plan.layers:
            continue
        for part, units in by_part(components):
            kept = [c for c in units if c.name in subnet.kept]
            if len(kept) == len(units):
                continue
            path = f"{anatomy.layers}.{i}.{part}"
            if part and not kept:
                plan.dropped[path] = units[0].kind
                continue
            if part:
                plan.counts[path, units[0].kind] = len(kept), len(units)
            _slice(plan.slices, units, kept)
    return plan


def _slice(slices: dict[str, list[Slice]], units: list[Component], kept: list[Component]) -> None:
    cut = dict.fromkeys((c.parameter, c.dim) for unit in units for c in unit.cuts)
    for parameter, dim in cut:
        spans = sorted((c.start, c.stop) for u in kept for c in u.cuts if (c.parameter, c.dim) == (parameter, dim))
        joined: list[tuple[int, int]] = []
        for start, stop in spans:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        slices.setdefault(parameter, []).append(Slice(dim, tuple(joined)))


_INSIDE = "_manyvoice_narrowed"


@final
class Elastic:
    """A model that can be run as any of its subnets.

    Raises: ModelError for a model without anatomy, on entering one subnet inside another, and for reentrant activation
        checkpointing, whose gradients would be wrong without a word.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.family = model, family_of(model)
        self.anatomy = self.family.anatomy(model)
        self._plans: dict[frozenset[str], Plan] = {}

    def plan(self, subnet: Subnet) -> Plan:
        """What the subnet changes; remembered."""
        if subnet.kept not in self._plans:
            self._plans[subnet.kept] = plan_of(self.anatomy, subnet)
        return self._plans[subnet.kept]

    @contextmanager
    def at(self, subnet: Subnet, *, statistics: Statistics | None = None, dropout: bool = False) -> Iterator[None]:
        """The model is that subnet inside.

        Args:
            statistics: buffers of the subnet's own, by the whole model's names; what is measured inside goes there.
            dropout: rates of a part follow its kept width, p (kept units / all units), as a narrow part has less to
                spare (TODM, arXiv:2309.01947; the rule is RWTH's for feed-forward chunks).
        """
        if _INSIDE in self.model.__dict__:
            raise ModelError("this model is narrowed already; leave one subnet before entering another")
        refuse_reentrant(self.model)
        plan = self.plan(subnet)
        undo = _Undo()
        # on the model, as others may look at it too
        self.model.__dict__[_INSIDE] = True
        try:
            self._enter(plan, undo, statistics or {}, dropout)
            yield
        finally:
            undo.run()
            del self.model.__dict__[_INSIDE]

    def _enter(self, plan: Plan, undo: _Undo, statistics: Statistics, dropout: bool) -> None:
        model, family = self.model, self.family
        for name, slices in plan.slices.items():
            path, _, leaf = name.rpartition(".")
            x: Tensor = model.get_parameter(name)
            for one in slices:
                x = one.of(x)
            undo.attribute(model.get_submodule(path), leaf, x)
        for (path, kind), (kept, total) in plan.counts.items():
            module = model.get_submodule(path)
            for attribute, value in family.resized(module, kind, kept).items():
                undo.attribute(module, attribute, value)
            for attribute in family.dropouts(kind) if dropout else ():
                undo.attribute(module, attribute, getattr(module, attribute) * kept / total)
        for name, tensor in statistics.items():
            path, _, leaf = name.rpartition(".")
            undo.buffer(model.get_submodule(path), leaf, tensor)
        for path, kind in plan.dropped.items():
            parent, _, leaf = path.rpartition(".")
            undo.module(model.get_submodule(parent), leaf, family.stub(kind))
        if len(plan.layers) < self.anatomy.depth:
            parent, _, leaf = self.anatomy.layers.rpartition(".")
            layers = model.get_submodule(self.anatomy.layers)
            short = nn.ModuleList([layers.get_submodule(str(i)) for i in plan.layers])
            short.training = layers.training
            undo.module(model.get_submodule(parent), leaf, short)

    def statistics(self) -> dict[str, Tensor]:
        """A copy of the running statistics of all norms, for a subnet to have as its own."""
        norms = {id(norm) for norm in masked_norms(self.model)}
        paths = [path for path, module in self.model.named_modules() if id(module) in norms]
        return {f"{p}.{n}": b.clone() for p in paths for n, b in self.model.get_submodule(p).named_buffers()}


class _Undo:
    """Changes that can be taken back."""

    def __init__(self) -> None:
        self._steps: list[tuple[dict[str, Any], str, bool, Any]] = []

    def attribute(self, module: nn.Module, name: str, value: object) -> None:
        self._set(module.__dict__, name, value)

    def module(self, parent: nn.Module, name: str, value: nn.Module) -> None:
        self._set(parent._modules, name, value)

    def buffer(self, module: nn.Module, name: str, value: Tensor) -> None:
        if name not in module._buffers:
            raise ModelError(f"{type(module).__name__} has no statistics {name!r}; measure the size's again")
        old = module._buffers[name]
        # on the model's device; one that is there already stays itself, as what is measured inside goes into it
        self._set(module._buffers, name, value if old is None else value.to(old.device))

    def _set(self, where: dict[str, Any], name: str, value: object) -> None:
        self._steps.append((where, name, name in where, where.get(name)))
        where[name] = value

    def run(self) -> None:
        for where, name, was, value in reversed(self._steps):
            if was:
                where[name] = value
            else:
                del where[name]


def refuse_reentrant(model: nn.Module) -> None:
    """ModelError if activations are checkpointed the reentrant way: its backward pass would see the whole model."""
    for module in model.modules():
        how = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(how, "keywords", {}).get("use_reentrant", True):
            raise ModelError(
                "reentrant activation checkpointing computes wrong gradients in a narrowed model; enable it with "
                "model.activation_checkpointing_enable({'use_reentrant': False})"
            )
