"""A recogniser that answers with a voice, or each utterance with its own; every answer leaves its receipt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from manyvoice.data.manifest import Corpus
from manyvoice.decode.evaluate import Owned, group_of
from manyvoice.decode.recogniser import Recogniser
from manyvoice.errors import UsageError, VoiceError
from manyvoice.recipes.sizes import find_size
from manyvoice.recipes.transcribe import Transcript, Weights
from manyvoice.recipes.variant import Variant, load_variant, of_size, whole_variant
from manyvoice.submodels.cache import near
from manyvoice.submodels.pool import Loader, Narrowing, Resolver, Voices
from manyvoice.submodels.receipt import Receipt
from manyvoice.submodels.store import TENANT, Store
from manyvoice.submodels.voice import Voice
from manyvoice.types import Batch, Padded

# Voices on the host, where one process transcribes or evaluates.
_HOST_BYTES = 2**30


@final
class _File:
    """One voice file, as a place of names and of voices."""

    def __init__(self, path: Path) -> None:
        self.voice = Voice.read(path)

    def resolve(self, name: str, tenant: str, /) -> str:
        """Whatever it is called."""
        return self.voice.hash

    def get(self, hash: str, tenant: str, /) -> Voice:
        """The one there is."""
        return self.voice


@final
class _Nobody:
    """Where there are no voices."""

    def resolve(self, name: str, tenant: str, /) -> str:
        """Nothing means anything here."""
        raise UsageError(f"voice {name!r}: the model was loaded without voices; load it with that one")

    def get(self, hash: str, tenant: str, /) -> Voice:
        """As :meth:`resolve`."""
        raise VoiceError(f"voice {hash[:12]}: the model was loaded without voices; load it with that one")


@final
@dataclass
class Voiced:
    """A variant with voices.

    Attributes: receipts: of every utterance since the last :meth:`take`, in order.
    """

    variant: Variant
    voices: Voices
    tenant: str = TENANT
    receipts: list[Receipt] = field(default_factory=list)

    def recogniser(self, voice: str | None) -> Recogniser:
        """The variant's, all of whose answers are that voice's; without one the bare base's, with receipts."""
        return self.variant.recogniser.scored_by(lambda x_BTF, len_B: self.logp(x_BTF, len_B, [voice] * len(len_B)))

    def owned(self, names: Sequence[str | None]) -> Owned:
        """A voice, or None for the bare base, for every utterance of a corpus, for evaluation."""
        table = [None, *dict.fromkeys(name for name in names if name is not None)]
        place = {name: k for k, name in enumerate(table)}

        def scorer(batch: Batch) -> Padded:
            return self.logp(batch.features_BTF, batch.len_B, [table[int(k)] for k in batch.owner_B])

        return Owned(owners=[place[name] for name in names], scorer=scorer)

    def logp(self, features_BTF: Tensor, len_B: Tensor, names: Sequence[str | None]) -> Padded:
        """Log-probabilities B T V. Raises what the first voice that could not run did: nobody gets the base instead."""
        answers = [o.answer() for o in self.voices.scores(features_BTF, len_B, names, self.tenant)]
        self.receipts += [receipt for _, receipt in answers]
        x_BTV = torch.nn.utils.rnn.pad_sequence([x for x, _ in answers], batch_first=True)
        return Padded(x=x_BTV, len_B=torch.tensor([len(x) for x, _ in answers], device=x_BTV.device))

    def weights(self, voice: str | None) -> Weights:
        """Those that answer for that voice now: in a store it may be replaced at any time."""
        hash = None if voice is None else self.voices.names.resolve(voice, self.tenant)
        return Weights(base=self.variant.base, size=self.variant.size, hash=hash, voice=voice)

    def take(self) -> list[Receipt]:
        """The receipts, which are then forgotten here."""
        taken, self.receipts = self.receipts, []
        return taken


def with_receipts(voiced: Voiced, transcripts: Iterable[Transcript]) -> Iterator[Transcript]:
    """Each transcript with the receipt of the weights that made it: one, also where it was made of several pieces.

    Nothing runs on a recording that is too short to hold a word, so it has none.
    Raises: VoiceError if the voice was replaced between two pieces.
    """
    for transcript in transcripts:
        taken = voiced.take()
        if any(receipt != taken[0] for receipt in taken):
            raise VoiceError(
                f"{transcript.id}: the voice {taken[0].voice!r} was replaced in the store while this was transcribed; "
                "run it again"
            )
        yield replace(transcript, receipt=taken[0].as_dict() if taken else None)


@final
@dataclass(frozen=True)
class Served:
    """A corpus whose speakers have voices.

    Args: names: the voice of every utterance, None where its speaker has none.
    """

    voiced: Voiced
    names: list[str | None]

    @property
    def owned(self) -> Owned:
        """For evaluation."""
        return self.voiced.owned(self.names)

    def as_dict(self) -> dict[str, Any]:
        """How many utterances ran with which voice, by the receipts, with hash, method and sites.

        Raises: VoiceError if a voice was replaced meanwhile: the figures would be of two.
        """
        found: dict[str, dict[str, Any]] = {}
        for receipt in self.voiced.receipts:
            entry = found.setdefault(receipt.voice or "", receipt.as_dict() | {"utterances": 0})
            if entry["hash"] != receipt.hash:
                raise VoiceError(
                    f"the voice {receipt.voice!r} was replaced in the store while this was evaluated; run it again"
                )
            entry["utterances"] += 1
        return {"base": found.pop("", {}).get("utterances", 0), "voices": found}

    def text(self) -> str:
        """In a line."""
        voices = len({name for name in self.names if name is not None})
        bare = sum(name is None for name in self.names)
        return f"{len(self.names) - bare} utterances with {voices} voices of their speakers, {bare} with the bare base"


def serve_speakers(
    spec: str | Path,
    corpus: Corpus,
    *,
    size: str | None,
    voice: str | None,
    store: str | None,
    tenant: str,
    by: str = "speaker",
) -> Served:
    """One voice for all utterances, or each speaker's own where the store has one; the others run on the bare base.

    Args: by: the field of the corpus that the voices were made by.
    Raises: UsageError if the store has a voice of none of the speakers; what :func:`load_voiced` raises.
    """
    if voice is not None or store is None:
        voiced, name = load_voiced(spec, size=size, voice=voice, store=store, tenant=tenant)
        return Served(voiced, [name] * len(corpus))
    place = Store(store)
    known = {entry.name: entry for entry in place.entries(tenant)}
    owners = [group_of(u, by) for u in corpus]
    names = [owner if owner in known else None for owner in owners]
    bases = [known[name].base for name in names if name is not None]
    if not bases:
        some = ", ".join(sorted(known)[:5]) or "nobody"
        raise UsageError(f"--voices {store}: nobody in the corpus's field {by!r} has a voice there; it has {some}")
    variant = load_variant(spec, size, base=bases[0])
    return Served(_voiced(variant, place, near(place, host_bytes=_HOST_BYTES), tenant), names)


def load_voiced(
    spec: str | Path, *, size: str | None = None, voice: str | None, store: str | None = None, tenant: str = TENANT
) -> tuple[Voiced, str]:
    """A model with a voice of a store or with a voice file, and the name to ask it for.

    Args: voice: a name in the store, or without one the path of a voice file.
    Raises: UsageError for a name that the store has not, or a name without a store; VoiceError for a file that is no
        voice, or not for this base.
    """
    if store is not None and voice is not None:
        place = Store(store)
        found = place.get(voice, tenant)
        variant = load_variant(spec, size, base=found.base)
        voiced = _voiced(variant, place, near(place, host_bytes=_HOST_BYTES), tenant)
    elif voice is not None and Path(voice).is_file():
        file = _File(Path(voice))
        found, speaker = file.voice, file.voice.card.get("speaker")
        # not the file's name: the same voice leaves the same receipt wherever it lies
        voice = speaker if isinstance(speaker, str) and speaker else found.hash
        variant = load_variant(spec, size, base=found.base)
        voiced = _voiced(variant, file, file, tenant)
    else:
        raise UsageError(f"--voice {voice}: is no file; give a voice file, or a name with --voices STORE")
    variant.check(found)
    return voiced, voice


def load_bare(spec: str | Path, *, size: str | None = None, tenant: str = TENANT) -> Voiced:
    """A model without voices, whose answers have receipts too. An extracted folder is a base of its own here.

    Raises: UsageError for a size that there is not.
    """
    recogniser = Recogniser.load(spec)
    variant = whole_variant(recogniser) if size is None else of_size(recogniser, find_size(recogniser, size))
    nobody = _Nobody()
    return _voiced(variant, nobody, nobody, tenant)


def _voiced(variant: Variant, names: Resolver, voices: Loader, tenant: str) -> Voiced:
    recogniser = variant.recogniser
    narrowing = Narrowing(size=variant.size, layers=variant.layers, slices=variant.slices)
    return Voiced(variant, Voices(
        recogniser.model, variant.anatomy, base=variant.base, tokenizer=recogniser.tokenizer.fingerprint(),
        names=names, voices=voices, narrowing=narrowing,
    ), tenant)  # fmt: skip
