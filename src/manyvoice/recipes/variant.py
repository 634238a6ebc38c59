"""Base and size of a variant, as voices see them: whose fingerprint they name, and which sites are left.

S  rows of a bank   B  utterances   T  encoder frames   V  vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from torch import Tensor

from manyvoice.decode.evaluate import Owned
from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.narrow import Elastic, Slice
from manyvoice.errors import ModelError
from manyvoice.models.anatomy import Anatomy, Cost, Site
from manyvoice.recipes.sizes import SUBNET, Size, all_sizes, alone, find_size
from manyvoice.submodels.bank import Bank, Ran, Slices
from manyvoice.submodels.voice import Voice
from manyvoice.train.objective import ctc_per_utterance, scores_of
from manyvoice.types import Batch, Padded


@final
@dataclass(frozen=True, kw_only=True)
class Variant:
    """A recogniser of one size, and what a voice of its base needs to run on it.

    Args:
        base: fingerprint that voices name: of the whole model.
        anatomy: of the whole model.
        size: its name, where the base has several.
        layers: original index of each layer that is left.  slices: what is left of the whole model's parameters.
    """

    recogniser: Recogniser
    base: str
    anatomy: Anatomy
    size: str | None = None
    layers: tuple[int, ...] | None = None
    slices: Mapping[str, list[Slice]] = field(default_factory=dict)

    def check(self, voice: Voice) -> Voice:
        """The voice, if it was made for this base. VoiceError says what does not fit."""
        return voice.check(self.anatomy, base=self.base, tokenizer=self.recogniser.tokenizer.fingerprint())

    @contextmanager
    def on(self, bank: Bank, owner_B: Tensor) -> Iterator[Ran]:
        """Inside, the recogniser's model runs with these rows of a bank."""
        with bank.on(self.recogniser.model, owner_B, layers=self.layers, slices=self.slices) as ran:
            yield ran

    def logp(self, bank: Bank, owner_B: Tensor, features_BTF: Tensor, len_B: Tensor) -> Padded:
        """Log-probabilities B T V of utterances with these rows of a bank."""
        with self.on(bank, owner_B):
            return self.recogniser.logp(features_BTF, len_B)


def load_variant(spec: str | Path, size: str | None = None, *, base: str | None = None, device: str = "cpu") -> Variant:
    """A model folder, whole or extracted, or one of a supernet's sizes. UsageError for a size that there is not.

    Args: base: which the voices to come name, if known. An extracted folder runs those of its supernet, and those that
        were made for itself.
    """
    recogniser = Recogniser.load(spec, device=device)
    if size is not None:
        return of_size(recogniser, find_size(recogniser, size))
    assert recogniser.folder is not None, "loaded from a folder"
    extracted = recogniser.folder / SUBNET
    if not extracted.is_file() or recogniser.fingerprint() == base:
        return whole_variant(recogniser)
    return _of_extracted(recogniser, extracted)


def whole_variant(recogniser: Recogniser) -> Variant:
    """A recogniser that is a base itself."""
    return Variant(
        recogniser=recogniser, base=recogniser.fingerprint(), anatomy=recogniser.family.anatomy(recogniser.model)
    )


def all_variants(recogniser: Recogniser) -> list[Variant]:
    """A supernet's sizes, largest first. UsageError for a model that has none."""
    return [of_size(recogniser, size) for size in all_sizes(recogniser)]


def of_size(recogniser: Recogniser, size: Size) -> Variant:
    """One of a supernet's sizes, as a model of its own."""
    elastic = Elastic(recogniser.model)
    plan = elastic.plan(size.subnet)
    return Variant(
        recogniser=alone(recogniser, elastic, size),
        base=recogniser.fingerprint(),
        anatomy=elastic.anatomy,
        size=size.subnet.name,
        layers=plan.layers,
        slices=plan.slices,
    )


def owned_loss(
    variant: Variant,
    bank: Bank,
    batch: Batch,
    *,
    slices: Slices | None = None,
    inside: AbstractContextManager[object] | None = None,
) -> Tensor:
    """-log p of each utterance with its owner's row, B.

    Args: slices, inside: of a size that the variant's model, a supernet, is run as; sites are looked up before that.
    """
    recogniser = variant.recogniser
    with bank.on(recogniser.model, batch.owner_B, slices=slices), inside or nullcontext():
        scores = scores_of(recogniser.model, batch)
    blank = recogniser.family.blank(recogniser.model)
    return ctc_per_utterance(scores, batch.tokens_BU, batch.token_len_B, blank)


def owned_by(variant: Variant, bank: Bank, owners: Sequence[int]) -> Owned:
    """Utterances that run on a variant with these rows of a bank, for evaluation."""
    return Owned(owners=owners, scorer=lambda b: variant.logp(bank, b.owner_B, b.features_BTF, b.len_B))


def _of_extracted(recogniser: Recogniser, path: Path) -> Variant:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        sites = tuple(Site(**site) for site in said["voices"]["sites"])
        slices = {
            name: [Slice(dim, tuple((a, b) for a, b in ranges)) for dim, ranges in found]
            for name, found in said["voices"]["slices"].items()
        }
        layers, base, size = tuple(said["original_layers"]), said["supernet"], said["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: does not say how voices of its supernet run on it ({error!r}); extract the size again with "
            "`manyvoice subnets SUPERNET extract`"
        ) from error
    own = recogniser.family.anatomy(recogniser.model)
    whole = Anatomy(
        layers=own.layers, depth=1 + max(site.layer for site in sites), width=own.width, sites=sites, components=(),
        taps=(), front=Cost(), head=Cost(),
    )  # fmt: skip
    return Variant(recogniser=recogniser, base=base, anatomy=whole, size=size, layers=layers, slices=slices)
