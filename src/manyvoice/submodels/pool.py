"""Mixed-voice inference: any voices, of any methods, and the bare base in one batch, each answer with its receipt.

A voice that cannot run fails its own request and no other; nothing ever falls back to the base.

    B  utterances   T  frames   F  features   V  vocabulary
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyvoice.errors import ManyvoiceError, ModelError, UsageError, VoiceError
from manyvoice.models.anatomy import Anatomy, family_of
from manyvoice.submodels.bank import Bank, Ran, Slices, bytes_per_row
from manyvoice.submodels.method import Edit
from manyvoice.submodels.receipt import Receipt
from manyvoice.submodels.voice import Voice

# (tenant, hash): by content, so that a name that is given another voice never meets the old one's row; and by tenant,
# so that no tenant's request depends on what another one has loaded
Key = tuple[str, str]
# A voice that cannot be loaded is asked for so many times more while its name still means it.
_TRIES = 2
# (method with its settings) at once; each has a bank of its own, and settings come from files that users hand in
METHODS = 8


class Resolver(Protocol):
    """What a name means now."""

    def resolve(self, name: str, tenant: str, /) -> str:
        """The hash. UsageError for a name that there is not."""


class Loader(Protocol):
    """Where voices come from."""

    def get(self, hash: str, tenant: str, /) -> Voice:
        """The voice. VoiceError for one that is not there, damaged, or another tenant's."""


@final
@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """Which subnet of the base the model is run as.

    Args:
        size: its name; None for the whole model.
        layers: the original index of each of the model's layers, for an extracted model.
        slices: what it keeps of the whole model's parameters, where sites are narrowed.
        inside: makes the model that subnet while a batch runs: ``lambda: elastic.at(subnet)``.  Sites are looked up
            before, in the whole model, so a model must not be narrowed around :meth:`Voices.scores`.
    """

    size: str | None = None
    layers: Sequence[int] | None = None
    slices: Slices | None = None
    inside: Callable[[], AbstractContextManager[object]] = nullcontext


@final
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one utterance: log-probabilities T V, no padding, and a receipt; or an error."""

    logp_TV: Tensor | None = None
    receipt: Receipt | None = None
    error: ManyvoiceError | None = None

    def answer(self) -> tuple[Tensor, Receipt]:
        """Log-probabilities and receipt; raises the error if there is one."""
        if self.logp_TV is None or self.receipt is None:
            raise self.error or VoiceError("this request has neither an answer nor an error; run it again")
        return self.logp_TV, self.receipt


@final
@dataclass(frozen=True, kw_only=True)
class Room:
    """What voices may take on the device; how large one is, its file says.

    Args:
        rows: voices of one method that are there at once, at most.  A batch with more of them runs in several parts.
        bytes: of all of them.
    Raises: UsageError for numbers below 1.
    """

    rows: int = 64
    bytes: int = 2 * 2**30

    def __post_init__(self) -> None:
        for name in ("rows", "bytes"):
            if getattr(self, name) < 1:
                usual = getattr(Room, name)
                raise UsageError(f"{name} = {getattr(self, name)}: must be 1 or more; {usual} is usual")


_WHOLE, _USUAL = Narrowing(), Room()


@final
class Voices:
    """A model that answers with voices. Threads may share it; batches run one after the other.

    Args:
        model: in evaluation mode from here on; banks have its device and type.  anatomy: of the whole base.
        base, tokenizer: fingerprints that voices must have been made for; ``base`` is the supernet's for a size of it.
        room: that voices have on the device.
        narrowing: which size the model is run as; the whole model if not given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        *,
        base: str,
        tokenizer: str,
        names: Resolver,
        voices: Loader,
        room: Room = _USUAL,
        narrowing: Narrowing = _WHOLE,
    ) -> None:
        self.model, self.anatomy, self.base, self.tokenizer = model.eval(), anatomy, base, tokenizer
        self.names, self.voices, self.narrowing = names, voices, narrowing
        self._slots = _Slots(model, anatomy, room)
        self._lock = _lock_of(model)

    def scores(
        self,
        features_BTF: Tensor,
        len_B: Tensor,
        voices: Sequence[str | None],
        tenant: str | Sequence[str] = "default",
    ) -> list[Outcome]:
        """An outcome for each utterance; None among ``voices`` is the bare base.

        A name is looked up on arrival, and again only if what it meant is gone before it could be loaded. Looking up
        and loading happen outside of the lock that a batch runs under.

        Args: features_BTF: log-mel, zeros after each length.  len_B: int64.  tenant: one, or one for each utterance.
        Raises: UsageError if there is not one voice for each utterance.
        """
        tenants = [tenant] * len(voices) if isinstance(tenant, str) else tenant
        if not len(voices) == len(tenants) == len(len_B) == len(features_BTF):
            raise UsageError(
                f"{len(features_BTF)} utterances, {len(len_B)} lengths, {len(voices)} voices and {len(tenants)} "
                "tenants: there must be as many of each; write None for the bare base"
            )
        requests = [_Request(voice, tenant) for voice, tenant in zip(voices, tenants, strict=True)]
        key_B, errors = self._resolve(dict(enumerate(requests)))
        errors |= {
            b: UsageError(f"utterance {b} has {n} feature frames: must be 1 or more; leave silence out")
            for b, n in enumerate(len_B.tolist())
            if n < 1
        }
        outcomes = {b: Outcome(error=error) for b, error in errors.items()}
        loaded: dict[Key, Voice] = {}
        failed: dict[Key | None, ManyvoiceError] = {}
        again, tried = False, Counter[Key | None]()
        while todo := {b: key for b, key in key_B.items() if b not in outcomes}:
            # what was on the device at first may be gone when its turn comes, so later rounds load all that is left
            missing = dict.fromkeys(key for key in todo.values() if key is not None and key not in loaded)
            self._load([key for key in missing if again or not self._slots.has(key)], loaded, failed)
            with self._lock:
                part = self._slots.place({b: k for b, k in todo.items() if k not in failed}, loaded, failed)
                logp, ran = self._run(features_BTF, len_B, part)
            outcomes |= {b: self._outcome(requests[b], logp[b], slot, ran) for b, slot in part.items()}
            lost = {b: failed[key] for b, key in todo.items() if key in failed}
            moved, _ = self._resolve({b: requests[b] for b in lost})
            # replaced since it arrived: what the name meant may be gone, what it means now is an answer as good; that
            # may even be what it meant at first, taken away and brought back meanwhile
            tried.update(set(moved.values()) & failed.keys())
            failed = {key: error for key, error in failed.items() if tried[key] > _TRIES or key not in moved.values()}
            key_B |= (moved := {b: key for b, key in moved.items() if key not in failed})
            outcomes |= {b: Outcome(error=error) for b, error in lost.items() if b not in moved}
            again = True
        return [outcomes[b] for b in range(len(voices))]

    def forget(self, hash: str, tenant: str = "default") -> None:
        """Wipe a voice that was removed from the device; the cache that it came through has a `forget` of its own."""
        with self._lock:
            self._slots.forget((tenant, hash))

    def _resolve(self, requests: Mapping[int, _Request]) -> tuple[dict[int, Key | None], dict[int, ManyvoiceError]]:
        """What each utterance wants, or what is wrong with its name; one name has one meaning in all of the batch."""
        found: dict[_Request, Key | None] = {}
        errors: dict[_Request, ManyvoiceError] = {}
        for request in dict.fromkeys(requests.values()):
            voice, tenant = request
            try:
                found[request] = None if voice is None else (tenant, self.names.resolve(voice, tenant))
            except ManyvoiceError as error:
                errors[request] = error
        return (
            {b: found[request] for b, request in requests.items() if request in found},
            {b: errors[request] for b, request in requests.items() if request in errors},
        )

    def _load(self, keys: Iterable[Key], loaded: dict[Key, Voice], failed: dict[Key | None, ManyvoiceError]) -> None:
        """Voices that fit the model go to ``loaded``; what is wrong with the others to ``failed``."""
        for key in keys:
            tenant, hash = key
            try:
                voice = self.voices.get(hash, tenant)
                if voice.hash != hash:
                    raise VoiceError(
                        f"voice {hash[:12]}: got {voice.hash[:12]} in its place; copy the voice again from where it is "
                        "whole"
                    )
                loaded[key] = voice.check(self.anatomy, base=self.base, tokenizer=self.tokenizer)
            except ManyvoiceError as error:
                failed[key] = error

    @torch.no_grad()
    def _run(
        self, features_BTF: Tensor, len_B: Tensor, part: dict[int, _Slot | None]
    ) -> tuple[dict[int, Tensor], dict[Bank, Ran]]:
        """Log-probabilities of some utterances, run as one batch, and what each bank edited."""
        if not part:
            return {}, {}
        model, family, places = self.model, family_of(self.model), torch.tensor(list(part))
        len_B = len_B[places.to(len_B.device)]
        features_BTF = features_BTF[places.to(features_BTF.device), : int(len_B.max())]
        ran: dict[Bank, Ran] = {}
        with ExitStack() as on:
            for bank in dict.fromkeys(slot.bank for slot in part.values() if slot is not None):
                owner_B = torch.tensor([s.row if s is not None and s.bank is bank else 0 for s in part.values()])
                layers, slices = self.narrowing.layers, self.narrowing.slices
                ran[bank] = Ran()
                # a size that has none of the sites: its receipts say that nothing was edited, and the others run
                with suppress(ModelError):
                    ran[bank] = on.enter_context(bank.on(model, owner_B, layers=layers, slices=slices))
            on.enter_context(self.narrowing.inside())
            encoded = family.encode(model, features_BTF.to(model.device, model.dtype), len_B.to(model.device))
            scores = family.logits(model, encoded)
        logp_BTV = scores.x.log_softmax(-1)
        return {b: logp_BTV[k, :n] for k, (b, n) in enumerate(zip(part, scores.len_B.tolist(), strict=True))}, ran

    def _outcome(self, request: _Request, logp_TV: Tensor, slot: _Slot | None, ran: dict[Bank, Ran]) -> Outcome:
        bare = Receipt(base=self.base, size=self.narrowing.size, tenant=request.tenant)
        if slot is None:
            return Outcome(logp_TV=logp_TV, receipt=bare)
        if logp_TV.isnan().any():
            hash = slot.key[1][:12]
            return Outcome(error=VoiceError(
                f"voice {request.voice!r} ({hash}): what it makes of this utterance is not a number; remove it, and "
                "train it again with a lower learning rate"
            ))  # fmt: skip
        sites = ran[slot.bank].sites
        try:
            receipt = replace(
                bare, voice=request.voice, hash=slot.key[1], method=slot.bank.method, sites_ran=tuple(sites),
                sites_dropped=tuple(set(slot.bank.sites) - sites),
            )  # fmt: skip
        except VoiceError as error:
            return Outcome(error=error)
        return Outcome(logp_TV=logp_TV, receipt=receipt)


class _Request(NamedTuple):
    """Whose voice; none is the bare base."""

    voice: str | None
    tenant: str


@dataclass(frozen=True, eq=False)
class _Slot:
    """Where a voice is."""

    key: Key
    bank: Bank
    row: int


@final
class _Slots:
    """Rows of banks, one for each method, filled on demand; the voice that was wanted longest ago makes room.

    Only :meth:`has` may be called without the lock.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, room: Room) -> None:
        self._model, self._anatomy, self._room = model, anatomy, room
        self._banks: OrderedDict[Edit, Bank] = OrderedDict()
        self._free: dict[Bank, list[int]] = {}
        self._slots: OrderedDict[Key, _Slot] = OrderedDict()

    def has(self, key: Key) -> bool:
        """Whether a voice is there at this moment."""
        return key in self._slots

    def place(
        self, wanted: Mapping[int, Key | None], loaded: Mapping[Key, Voice], failed: dict[Key | None, ManyvoiceError]
    ) -> dict[int, _Slot | None]:
        """Slots for as many utterances as there is room for at once; None is the bare base.

        A voice that is not on the device must be among ``loaded``; one that is in neither is left out. What is wrong
        with one that cannot be put there goes to ``failed``.
        """
        for key in wanted.values():
            if key is not None and key in self._slots:
                self._touch(key)
        held: dict[Key, _Slot] = {}
        placed: dict[int, _Slot | None] = {}
        for b, key in wanted.items():
            if key is None:
                placed[b] = None
                continue
            try:
                slot = self._slots.get(key) or self._fill(key, loaded.get(key), held)
            except ManyvoiceError as error:
                failed[key] = error
                continue
            if slot is not None:
                placed[b] = held[key] = slot
        return placed

    @torch.no_grad()
    def forget(self, key: Key) -> None:
        """No number of it is left in its row."""
        if (slot := self._slots.pop(key, None)) is not None:
            for p in slot.bank.tensors.values():
                p[slot.row].zero_()
            self._free[slot.bank].append(slot.row)

    def _touch(self, key: Key) -> None:
        self._slots.move_to_end(key)
        self._banks.move_to_end(self._slots[key].bank.method)

    def _fill(self, key: Key, voice: Voice | None, held: Mapping[Key, _Slot]) -> _Slot | None:
        """A slot for a new voice; None if every one is held by this batch, or there is no voice."""
        bank = None if voice is None else self._bank(voice.method, held)
        if voice is None or bank is None:
            return None
        if not self._free[bank]:
            oldest = next((k for k, slot in self._slots.items() if slot.bank is bank and k not in held), None)
            if oldest is None:
                return None
            self._free[bank].append(self._slots.pop(oldest).row)
        row = self._free[bank][-1]
        bank.put(row, voice.tensors)
        # only now: a row that could not be filled stays free
        self._free[bank].pop()
        self._slots[key] = _Slot(key, bank, row)
        self._touch(key)
        return self._slots[key]

    def _bank(self, method: Edit, held: Mapping[Key, _Slot]) -> Bank | None:
        """The bank of a method; None if there are as many as there may be and this batch holds all of them.

        Raises: VoiceError if not even one row of that method fits on the device.
        """
        if method in self._banks:
            return self._banks[method]
        p = next(self._model.parameters())
        row = max(1, bytes_per_row(self._anatomy, method, p.dtype))
        # the first row of a bank is the base's
        count = min(self._room.rows, self._room.bytes // row - 1)
        if count < 1:
            raise VoiceError(
                f"a voice of {method.name} with these settings takes {row} bytes on the device and the base's row as "
                f"many, more than the {self._room.bytes} that voices may take: allow more, or train it with smaller "
                "settings"
            )
        holding = {slot.bank for slot in held.values()}
        while len(self._banks) == METHODS or self._taken() + (count + 1) * row > self._room.bytes:
            oldest = next((m for m, bank in self._banks.items() if bank not in holding), None)
            if oldest is None:
                return None
            self._drop(oldest)
        owners = [f"row {k}" for k in range(1, count + 1)]
        try:
            bank = Bank(self._anatomy, method, owners, empty=True, dtype=p.dtype, device=p.device)
        except RuntimeError as error:  # torch's own kind where memory runs out, on any device
            raise VoiceError(
                f"no room for {count + 1} rows of {row} bytes of {method.name} on {p.device} ({error}); allow voices "
                "fewer rows or bytes"
            ) from error
        self._banks[method], self._free[bank] = bank, list(range(count, 0, -1))
        return bank

    def _taken(self) -> int:
        """Bytes of all banks."""
        return sum(p.numel() * p.element_size() for bank in self._banks.values() for p in bank.parameters())

    def _drop(self, method: Edit) -> None:
        gone = self._banks.pop(method)
        del self._free[gone]
        for key in [key for key, slot in self._slots.items() if slot.bank is gone]:
            del self._slots[key]


_LOCKS: WeakKeyDictionary[PreTrainedModel, threading.Lock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def _lock_of(model: PreTrainedModel) -> threading.Lock:
    """One for each model: hooks are the model's, so two sizes of one supernet must not run at once."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.Lock())
