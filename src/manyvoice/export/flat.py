"""A voice as one vector of numbers, for runtimes that know neither sites nor parts.

The tensors follow each other in the order of a layout: the sites in the order of the model, at each site the parts in
the order of the method, each in C order. A vector of zeros is the bare base.

P  numbers of a voice
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from manyvoice.errors import VoiceError, WorkError
from manyvoice.models.anatomy import Anatomy, Site
from manyvoice.submodels.bank import Bank, Slices, Where, parts_of
from manyvoice.submodels.method import Edit
from manyvoice.submodels.voice import Voice

FORMAT = "voices.v1"
# Standard deviation of what is added to untrained voices: enough to show at every site, too little to drown the model.
_NOISE = 0.05


@final
@dataclass(frozen=True)
class Place:
    """Where one tensor lies in the vector: from ``offset`` on. The key is empty for what a voice has once."""

    key: str
    part: str
    shape: tuple[int, ...]
    offset: int

    @property
    def where(self) -> Where:
        """As a voice calls it."""
        return self.key, self.part

    @property
    def stop(self) -> int:
        """Offset of what follows."""
        return self.offset + prod(self.shape)


Layout = tuple[Place, ...]


def layout_of(method: Edit, anatomy: Anatomy) -> Layout:
    """Where the tensors of any voice of that method for that whole base lie."""
    places: list[Place] = []
    for (key, part), what in parts_of(method, method.sites(anatomy)).items():
        places.append(Place(key, part, what.shape, places[-1].stop if places else 0))
    return tuple(places)


def flat(voice: Voice, layout: Layout) -> np.ndarray:
    """The voice's numbers, float32 P. VoiceError if it has other tensors than the layout."""
    found = {where: tuple(t.shape) for where, t in voice.tensors.items()}
    if found != {place.where: place.shape for place in layout}:
        raise VoiceError(
            f"voice {voice.hash[:12]} has {len(found)} tensors that are not the {len(layout)} of this layout; it was "
            "made with another method, other settings or for another base"
        )
    rows = [voice.tensors[place.where].detach().cpu().float().reshape(-1) for place in layout]
    return torch.cat(rows).numpy().astype("<f4")


def write_flat(voice: Voice, layout: Layout, path: Path) -> Path:
    """Write the vector: ``.npy`` for NumPy, any other name the bare little-endian float32 numbers, 4 P bytes.

    Raises: VoiceError as :func:`flat` does; WorkError if the file cannot be written.
    """
    vector_P = flat(voice, layout)
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, vector_P, allow_pickle=False)
            else:
                file.write(vector_P.tobytes())
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise WorkError(f"{path}: cannot be written ({error}); free space or choose another place") from error
    return path


@final
@dataclass(frozen=True, kw_only=True)
class VoiceInput:
    """What an exported model must know to be given voices.

    Args:
        method: of all voices that it will be given; one that stands by itself.
        anatomy, base: of the whole base model, and the fingerprint of its weights.
        layers, slices: where the model is one of the base's sizes: the original index of its layers, and what it keeps
            of the base's parameters.
        voices: with which it is tried, and which are written beside it.
    Raises: VoiceError for a method whose voices share tensors, one to which zeros are not the bare base, and voices of
        another method or other settings.
    """

    method: Edit
    anatomy: Anatomy
    base: str
    layers: Sequence[int] | None = None
    slices: Slices | None = None
    voices: tuple[Voice, ...] = field(default=())

    def __post_init__(self) -> None:
        _check_method(self.method, self.sites)
        for voice in self.voices:
            if voice.method != self.method:
                raise VoiceError(
                    f"voice {voice.hash[:12]} is {_told(voice.method)}, but this export takes {_told(self.method)}; "
                    "one file has voices of one method with one set of settings: export the others by themselves"
                )

    @property
    def sites(self) -> dict[str, Site]:
        """Of the whole base, by key."""
        return {site.key: site for site in self.method.sites(self.anatomy)}

    @property
    def layout(self) -> Layout:
        """See :func:`layout_of`."""
        return layout_of(self.method, self.anatomy)

    def describe(self, tokenizer: str) -> dict[str, Any]:
        """What a runtime, or whoever makes a voice for it, must know; plain JSON values."""
        return {
            "format": FORMAT,
            "method": self.method.name,
            "settings": self.method.settings(),
            "base": self.base,
            "tokenizer": tokenizer,
            "numbers": self.layout[-1].stop,
            "layout": [[p.key, p.part, list(p.shape), p.offset] for p in self.layout],
        }

    def write(self, folder: Path, tokenizer: str) -> tuple[Path, ...]:
        """``voices.json``, and ``voices/<hash>.npy`` for each voice; returns the latter. WorkError if it cannot be."""
        layout = self.layout
        files = tuple(write_flat(v, layout, folder / "voices" / f"{v.hash[:12]}.npy") for v in self.voices)
        told = [{"file": f"voices/{f.name}", "hash": v.hash} for f, v in zip(files, self.voices, strict=True)]
        text = json.dumps(self.describe(tokenizer) | {"voices": told}, indent=1) + "\n"
        (folder / "voices.json").write_text(text, encoding="utf-8")
        return files


def fresh(voices: VoiceInput, *, count: int = 3) -> torch.Tensor:
    """Vectors of voices that say something at every site, K P, to try a model with; always the same ones."""
    gen = torch.Generator().manual_seed(0)
    layout = voices.layout
    bank = Bank(voices.anatomy, voices.method, [str(k) for k in range(count)])
    rows = [torch.cat([bank.tensors[p.where][k].detach().reshape(-1) for p in layout]) for k in range(1, count + 1)]
    start_KP = torch.stack(rows)
    return start_KP + _NOISE * torch.randn(start_KP.shape, generator=gen)


def _told(method: Edit) -> str:
    return f"{method.name} {method.settings()}"


def _check_method(method: Edit, sites: dict[str, Site]) -> None:
    parts = parts_of(method, sites.values())
    if method.alone() is not method or any(part.scope == "shared" for part in parts.values()):
        raise VoiceError(
            f"method {method.name}: its voices share tensors, which no single vector holds; export with "
            f"{method.alone().name}, which its voices are by themselves"
        )
    gen = torch.Generator().manual_seed(0)
    for site in sites.values():
        x = torch.randn(1, 2, site.width_in, generator=gen)
        y = x if site.kind == "stream" else torch.randn(1, 2, site.width_out, generator=gen)
        if not torch.equal(method.edit({n: torch.zeros(1, *p.shape) for n, p in method.parts(site).items()}, x, y), y):
            raise VoiceError(
                f"method {method.name}: with zeros for all its tensors it changes what {site.key} computes, so zeros "
                "could not stand for the bare base; merge the voice instead (--to folder) if its method can be"
            )
