"""Optimiser state and random state as tensors and JSON, exactly, so that a checkpoint needs no pickle."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manyvoice.errors import CheckpointError, UsageError

Named: TypeAlias = Iterable[tuple[str, nn.Parameter]]
Packed: TypeAlias = tuple[dict[str, Tensor], dict[str, Any]]

_NOT_OPTIONS = ("params", "param_names")


def pack_optimizer(optimizer: Optimizer, names: Named | None = None) -> Packed:
    """State and settings of an optimiser, keyed by parameter name: tensors, and what JSON holds.

    Works for every optimiser whose state is tensors and numbers. Tensors are not copied.

    Args: names: (name, parameter); None takes the names the optimiser was built with.
    Raises: UsageError if a parameter has no name; CheckpointError if there is state that is neither.
    """
    groups = _named_groups(optimizer, names)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, p in chain.from_iterable(groups):
        entry: dict[str, Any] = {"shape": list(p.shape)}
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"state/{key}/{name}"] = value.detach()
            else:
                entry[key] = _plain(value, f"state {key!r} of {name!r}")
        numbers[name] = entry
    saved = []
    for i, (group, members) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        options = {key: value for key, value in group.items() if key not in _NOT_OPTIONS}
        for key in [key for key, value in options.items() if isinstance(value, Tensor)]:
            tensors[f"group/{i}/{key}"] = options.pop(key).detach()
        plain = {key: _plain(value, f"option {key!r} of group {i}") for key, value in options.items()}
        saved.append({"names": [name for name, _ in members], "options": plain})
    return tensors, {"class": type(optimizer).__name__, "groups": saved, "numbers": numbers}


def unpack_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any], names: Named | None = None
) -> None:
    """Put packed state and settings into an optimiser over the same names, bit for bit.

    Raises: CheckpointError naming what does not fit: another class, other groups, names, shapes, or unknown entries.
    """
    groups = _named_groups(optimizer, names)
    try:
        _check_fits(optimizer, groups, state)
        loaded = optimizer.state_dict()
        places = _places(loaded, groups)
        loaded["state"] = {}
        for name, entry in state["numbers"].items():
            plain = {key: value for key, value in entry.items() if key != "shape"}
            if plain:
                loaded["state"][places[name]] = plain
        for old, new in zip(loaded["param_groups"], state["groups"], strict=True):
            for key, value in new["options"].items():
                old[key] = tuple(value) if isinstance(value, list) and not isinstance(old.get(key), list) else value
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"the packed optimiser state is not what pack_optimizer writes: {error!r}") from error
    for path, tensor in tensors.items():
        where, _, rest = path.partition("/")
        first, _, last = rest.partition("/")
        if where == "state" and last in places:
            loaded["state"].setdefault(places[last], {})[first] = tensor.clone()
        elif where == "group" and first.isdecimal() and int(first) < len(groups):
            loaded["param_groups"][int(first)][last] = tensor.clone()
        else:
            raise CheckpointError(
                f"optimiser tensor {path!r} belongs to no parameter of this run; resume with its own run file"
            )
    optimizer.load_state_dict(loaded)
    _undo_casts(optimizer, loaded, groups)


def pack_random() -> Packed:
    """The states of torch's generators (CPU, and CUDA where it is in use), numpy's global one and python's."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    legacy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    if legacy["bit_generator"] != "MT19937":
        raise CheckpointError(f"numpy's global generator is {legacy['bit_generator']}; only MT19937 can be stored")
    version, words, gauss = random.getstate()
    tensors["numpy"] = torch.from_numpy(legacy["state"]["key"].astype(np.int64))
    tensors["python"] = torch.tensor(words, dtype=torch.int64)
    numpy_state = {
        "pos": int(legacy["state"]["pos"]),
        "has_gauss": int(legacy["has_gauss"]),
        "gauss": float(legacy["gauss"]),
    }
    return tensors, {"numpy": numpy_state, "python": {"version": version, "gauss": gauss}}


def unpack_random(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Set all generators to packed states; CUDA devices that are not here any more are left out.

    Raises: CheckpointError if a part is missing or malformed.
    """
    try:
        torch.set_rng_state(tensors["torch"].cpu())
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda{i}"].cpu(), i)
        words = {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": state["numpy"]["pos"]}
        np.random.set_state({"bit_generator": "MT19937", "state": words, **_only(state["numpy"], "has_gauss", "gauss")})
        python = state["python"]
        random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the packed random state is not what pack_random writes: {error!r}") from error


def _only(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: mapping[key] for key in keys}


def _named_groups(optimizer: Optimizer, names: Named | None) -> list[list[tuple[str, Tensor]]]:
    if names is None:
        if any("param_names" not in group for group in optimizer.param_groups):
            raise UsageError("this optimiser was built without names; pass names=model.named_parameters()")
        return [list(zip(g["param_names"], g["params"], strict=True)) for g in optimizer.param_groups]
    name_of = {id(p): name for name, p in names}
    missing = [tuple(p.shape) for g in optimizer.param_groups for p in g["params"] if id(p) not in name_of]
    if missing:
        raise UsageError(f"a parameter of shape {missing[0]} has no name; pass the names of all the optimiser steps")
    return [[(name_of[id(p)], p) for p in g["params"]] for g in optimizer.param_groups]


def _plain(value: object, where: str) -> object:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    if all(part is None or type(part) in (bool, int, float, str) for part in parts):
        return list(parts) if isinstance(value, (tuple, list)) else value
    raise CheckpointError(
        f"{where} of the optimiser is a {type(value).__name__}; only tensors and numbers can be stored"
    )


def _places(loaded: Mapping[str, Any], groups: list[list[tuple[str, Tensor]]]) -> dict[str, int]:
    """The index by which torch knows each name."""
    indices = chain.from_iterable(group["params"] for group in loaded["param_groups"])
    return {name: index for (name, _), index in zip(chain.from_iterable(groups), indices, strict=True)}


def _check_fits(optimizer: Optimizer, groups: list[list[tuple[str, Tensor]]], state: Mapping[str, Any]) -> None:
    way_out = "resume with its own run file, or start without its optimiser state"
    here, there = type(optimizer).__name__, state["class"]
    if here != there:
        raise CheckpointError(f"the state is of {there}, but this run steps with {here}; {way_out}")
    if len(groups) != len(state["groups"]):
        raise CheckpointError(f"the optimiser had {len(state['groups'])} groups, but has {len(groups)} now; {way_out}")
    for i, (members, saved) in enumerate(zip(groups, state["groups"], strict=True)):
        odd = sorted({name for name, _ in members} ^ set(saved["names"]))
        if odd:
            known = "is new" if odd[0] not in saved["names"] else "is gone"
            raise CheckpointError(f"group {i}: parameter {odd[0]!r} {known} ({len(odd)} differ); {way_out}")
    for name, p in chain.from_iterable(groups):
        if list(p.shape) != state["numbers"][name]["shape"]:
            was = tuple(state["numbers"][name]["shape"])
            raise CheckpointError(f"parameter {name!r} is {tuple(p.shape)} now, but was {was}; {way_out}")


def _undo_casts(optimizer: Optimizer, loaded: Mapping[str, Any], groups: list[list[tuple[str, Tensor]]]) -> None:
    """torch casts state to its parameter's type on loading; state kept in another type comes back as it was."""
    places = _places(loaded, groups)
    for name, p in chain.from_iterable(groups):
        for key, value in loaded["state"].get(places[name], {}).items():
            if isinstance(value, Tensor) and optimizer.state[p][key].dtype != value.dtype:
                optimizer.state[p][key] = value.to(optimizer.state[p][key].device)
