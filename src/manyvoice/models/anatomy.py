"""What is where in a speech model, in words that every capability shares.

Elastic training, submodels, side networks, cost counting and export speak only in the anatomy that a family
publishes here; none of them knows Parakeet from Whisper. A new family is one new file in this package with one
``FAMILY`` in it (or, outside this package, an object given to :func:`register`).

    T  encoder frames
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from manyvoice.errors import ModelError
from manyvoice.types import Frames, Padded, Seconds

SiteKind = Literal["linear", "stream"]
ComponentKind = Literal["ff_chunk", "head", "conv", "layer"]
HeadKind = Literal["ctc", "transducer", "decoder"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place that a submodel may edit: a linear map, or the residual stream after a block.

    Args:
        name: path of the module whose output is edited.
        kind: ``linear`` (x I -> y O) or ``stream`` (x D -> x D).
        role: what it does inside its layer, equal in every layer: ``attention.query``, ``ff1.up``, ``block``, ...
        layer: original layer index; submodels are keyed by (layer, role), which a subnet never renumbers.
        width_in, width_out: I and O of the whole model.
        reads_residual, writes_residual: that width is the residual stream's and so never shrinks in a subnet.
    """

    name: str
    kind: SiteKind
    role: str
    layer: int
    width_in: int
    width_out: int
    reads_residual: bool
    writes_residual: bool

    @property
    def key(self) -> str:
        """``layer.role``: what a stored submodel calls this site."""
        return f"{self.layer}.{self.role}"


@dataclass(frozen=True)
class Cut:
    """Where a component's units lie in one parameter: ``parameter`` without [start, stop) along ``dim``."""

    parameter: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Cost:
    """What a piece of a model costs: parameters, and ``per_frame * T + per_pair * T**2`` multiply-accumulates.

    Products with weights and between activations count; biases, norms and activation functions do not.
    """

    parameters: int = 0
    per_frame: float = 0.0
    per_pair: float = 0.0

    def macs(self, T: float) -> float:
        """Multiply-accumulates for one utterance of T encoder frames."""
        return self.per_frame * T + self.per_pair * T * T

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters, self.per_frame + other.per_frame, self.per_pair + other.per_pair
        )


@dataclass(frozen=True, kw_only=True)
class Component:
    """A group of units that a subnet may keep or drop, with its cost.

    Args:
        name: path of the group: ``layers.3.ff1.0``.
        kind: a feed-forward chunk, an attention head, a convolution module, or a whole layer (norms included).
        layer: original layer index.  index: place among its kind in that part of the layer.
        part: module inside the layer that shrinks (``feed_forward1``); empty for a whole layer.
        cuts: the units, parameter by parameter; empty where ``part`` is dropped as a whole.
        cost: what dropping it saves; for a layer, what is left of it when its other components are gone.
    """

    name: str
    kind: ComponentKind
    layer: int
    index: int
    part: str
    cuts: tuple[Cut, ...]
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A hidden state that a side network may read, and from which the rest of the model can be run again.

    Args:
        name: path of the module whose output is read.
        layer: original layer index; -1 is the input of the first layer.
        width: D.
    """

    name: str
    layer: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Sites, components and taps of one model, and the cost of what no subnet touches.

    Args:
        layers: path of the module list that holds the encoder's layers.
        depth, width: number of layers and D.
        front: cost of the front end per *encoder* frame.  head: cost of the output head.
        front_module: path of the module between the features and the first layer, whose output no subnet changes and
            which draws no random numbers; empty if there is none.
    """

    layers: str
    depth: int
    width: int
    sites: tuple[Site, ...]
    components: tuple[Component, ...]
    taps: tuple[Tap, ...]
    front: Cost
    head: Cost
    front_module: str = ""

    def site(self, key: str) -> Site:
        """The site called ``layer.role``; ModelError if there is none."""
        for site in self.sites:
            if site.key == key:
                return site
        raise ModelError(f"no site {key!r} in this model; its roles are {sorted({s.role for s in self.sites})}")


class Family(ABC):
    """One model family of Transformers, seen through its anatomy. Stateless."""

    name: str
    head: HeadKind

    @abstractmethod
    def matches(self, model: PreTrainedModel) -> bool:
        """Whether this family's file speaks about that model."""

    @abstractmethod
    def presets(self) -> Mapping[str, Mapping[str, object]]:
        """Named sizes, each a flat mapping of settings that :meth:`build` understands and a run file may change."""

    @abstractmethod
    def build(self, settings: Mapping[str, object], *, vocabulary: int, blank: int) -> PreTrainedModel:
        """A new model with random weights. ModelError names a setting that does not exist or does not fit."""

    @abstractmethod
    def features(self, model: PreTrainedModel) -> dict[str, object]:
        """Settings of the feature extractor that fits a model built here."""

    @abstractmethod
    def load(self, folder: str, **options: object) -> PreTrainedModel:
        """A model from a folder of this family, safetensors only."""

    @abstractmethod
    def claims(self, model_type: str) -> bool:
        """Whether a ``config.json`` with this ``model_type`` belongs to the family."""

    @abstractmethod
    def anatomy(self, model: PreTrainedModel) -> Anatomy:
        """What is where in the model."""

    @abstractmethod
    def encode(self, model: PreTrainedModel, features_BTF: Tensor, len_B: Tensor) -> Padded:
        """Encoder output B T D with its lengths in encoder frames."""

    @abstractmethod
    def logits(self, model: PreTrainedModel, encoded: Padded) -> Padded:
        """Scores B T V of a frame-synchronous head, before the softmax."""

    @abstractmethod
    def encoder_frames(self, model: PreTrainedModel, frames: int) -> Frames:
        """Encoder frames for that many feature frames."""

    @abstractmethod
    def encoder_shift(self, model: PreTrainedModel) -> Seconds:
        """Time from one encoder frame to the next."""

    @abstractmethod
    def blank(self, model: PreTrainedModel) -> int:
        """Index of the blank in the output vocabulary."""

    def renewed(self, model: PreTrainedModel, *, vocabulary: int, blank: int) -> PreTrainedModel:
        """A model with this one's encoder, its statistics included, and a new head for another vocabulary."""
        raise ModelError(
            f"{self.name} models cannot be given another vocabulary; set model.new_vocabulary=false, or train from a "
            "preset"
        )

    def prepare_training(self, model: PreTrainedModel) -> None:  # noqa: B027 - a hook that most families leave empty
        """Change what stock code gets wrong in training, keeping every parameter's name."""

    def resized(self, part: nn.Module, kind: ComponentKind, kept: int) -> Mapping[str, object]:
        """Attributes that a part's code reads, as they must be when that many of its units are kept."""
        return {}

    def dropouts(self, kind: ComponentKind) -> tuple[str, ...]:
        """Attributes of a part with such units that are dropout rates of what the units compute."""
        return ()

    def stub(self, kind: ComponentKind) -> nn.Module:
        """What stands for a part that is dropped as a whole: it adds nothing to the residual stream."""
        return Absent()

    def shaped(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
        """A model of these tensors, some of ``model``'s cut smaller and its layers renumbered, which a folder can hold.

        Raises: ModelError for a family whose folders hold no other shape than the whole.
        """
        raise ModelError(f"{self.name} models cannot be written in other sizes; run the whole model narrowed")


class Absent(nn.Module):
    """A part that is not there: zero, whatever comes in."""

    def forward(self, *inputs: Tensor, **more: Tensor) -> Tensor:
        """A scalar zero of the input's type."""
        x = next(v for v in (*inputs, *more.values()) if isinstance(v, Tensor))
        return x.new_zeros(())


_REGISTERED: list[Family] = []


def register(family: Family) -> Family:
    """Make a family from outside this package known; returns it. A second one of the same name is refused."""
    if family.name in {f.name for f in families()}:
        raise ModelError(f"a model family called {family.name!r} is registered already; give yours another name")
    _REGISTERED.append(family)
    return family


def unregister(family: Family) -> None:
    """Forget a family given to :func:`register`."""
    _REGISTERED.remove(family)


@cache
def _own_families() -> tuple[Family, ...]:
    package = importlib.import_module("manyvoice.models")
    modules = (importlib.import_module(f"manyvoice.models.{m.name}") for m in pkgutil.iter_modules(package.__path__))
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def families() -> tuple[Family, ...]:
    """All families: one for each file of this package that defines ``FAMILY``, then those registered."""
    return (*_own_families(), *_REGISTERED)


def family_of(model: PreTrainedModel) -> Family:
    """The family that publishes the model's anatomy. ModelError if none does."""
    for family in families():
        if family.matches(model):
            return family
    known = ", ".join(f.name for f in families())
    raise ModelError(
        f"no anatomy for {type(model).__name__}: known families are {known}; "
        "a new one is one file with a FAMILY (docs/architecture.md) or an object given to register()"
    )


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Shorthand for ``family_of(model).anatomy(model)``."""
    return family_of(model).anatomy(model)


def parameter_count(module: nn.Module) -> int:
    """Parameters of a module, each counted once."""
    return sum(p.numel() for p in module.parameters())
