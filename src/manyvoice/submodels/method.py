"""The contract of a method: what a submodel has at a site, and how that edits what the site computes.

    B  utterances   T  frames   I  input width   O  output width   D  model width   R  rank   S  submodels

A new method is one file in ``manyvoice.submodels.methods`` with a ``METHOD`` in it.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Literal

from torch import Tensor

from manyvoice.errors import UsageError
from manyvoice.models.anatomy import Anatomy, Site

Start = Literal["zeros", "ones", "normal"]
Scope = Literal["site", "voice", "shared"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor that a submodel has at a site.

    Args:
        shape: of one submodel's.
        scope: ``site``: each submodel has one at each site.  ``voice``: each submodel has one in all, which every site
            gets.  ``shared``: each site has one for all submodels.
        start: zeros, ones, or normal with a standard deviation of ``1 / sqrt(fan)``.  fan: for ``normal``.
        identity: what row 0 holds, so that its edit changes nothing.
        reads, writes: the dimension that is as long as the site's input, or output; a subnet that narrows the site
            narrows it too.
    """

    shape: tuple[int, ...]
    scope: Scope = "site"
    start: Start = "zeros"
    fan: int = 1
    identity: Literal["zeros", "ones"] = "zeros"
    reads: int | None = None
    writes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Edit(ABC):
    """A method with its settings. Subclasses are frozen dataclasses; their fields are the settings."""

    name: ClassVar[str]

    @abstractmethod
    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """Where it edits."""

    @abstractmethod
    def parts(self, site: Site) -> dict[str, Part]:
        """What a submodel has at such a site."""

    @abstractmethod
    def edit(self, tensors: Mapping[str, Tensor], x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        """The site's output B T O after the edit.

        Args: tensors: each B times its shape, a row for every utterance; a shared one has its shape alone.
            x_BTI, y_BTO: what the site got and computed; for a stream both are its output.
        """

    def alone(self) -> Edit:
        """The method of a submodel that stands by itself: this one, or where tensors are shared, what they make."""
        return self

    def settled(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What :meth:`alone` has at a site, from one submodel's tensors here, none with a leading axis."""
        return dict(tensors)

    def merged(
        self, tensors: Mapping[str, Tensor], weight_OI: Tensor, bias_O: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of a linear map that does what the site does after the edit; None where none can.

        Args: tensors: one submodel's at the site, none with a leading axis.  bias_O: None for a map without one.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """As they are stored."""
        return asdict(self)


@cache
def methods() -> dict[str, type[Edit]]:
    """All methods by name."""
    package = importlib.import_module("manyvoice.submodels.methods")
    found = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    return {module.METHOD.name: module.METHOD for module in found if hasattr(module, "METHOD")}


def make_method(name: str, settings: Mapping[str, Any] | None = None) -> Edit:
    """A method by name. UsageError for one that does not exist, or a setting that it does not have."""
    known = methods()
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in (settings or {}).items()}
    if name not in known:
        raise UsageError(f"method {name!r}: there are {', '.join(sorted(known))}")
    allowed = {f.name for f in fields(known[name])}
    if unknown := sorted(set(settings) - allowed):
        raise UsageError(f"method {name}: no setting {', '.join(unknown)}; it has {', '.join(sorted(allowed))}")
    for field in fields(known[name]):
        if field.name in settings and not _like(settings[field.name], field.default):
            raise UsageError(
                f"method {name}: {field.name} = {settings[field.name]!r}; must be of the kind of {field.default!r}, "
                "and finite"
            )
    return known[name](**settings)


def _like(value: object, usual: object) -> bool:
    """Whether a setting from outside is of the type of the usual one; whole numbers are numbers too."""
    if isinstance(usual, tuple):
        return isinstance(value, tuple) and all(isinstance(one, type(usual[0])) for one in value)
    if isinstance(usual, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is type(usual)
