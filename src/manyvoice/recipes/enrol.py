"""A new speaker in a space: predicted from seconds of speech, or learned from utterances with texts, then perhaps
refined; compared with the base where there are texts to compare on, and kept in a store as a voice of its own.

N  samples   E  numbers of a voice
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from manyvoice.data.check import check
from manyvoice.data.collate import HeldFeatures
from manyvoice.data.features import LogMel
from manyvoice.data.manifest import Corpus
from manyvoice.data.pauses import cut_at_pauses
from manyvoice.errors import UsageError
from manyvoice.recipes.space import FEWEST, Difference, Learning, Space, worth_of_prediction
from manyvoice.recipes.transcribe import Recording
from manyvoice.recipes.watch import Silent, Watcher
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.names import quote, tenant_path
from manyvoice.submodels.predict import LONGEST, SHORTEST
from manyvoice.submodels.store import TENANT, Store
from manyvoice.submodels.voice import Voice
from manyvoice.train.owners import Schedule, Speech
from manyvoice.types import Seconds

Floats = NDArray[np.float64]
How = Literal["auto", "learn", "predict"]

# Speakers that a refusal names.
_NAMED = 5
# A piece of a recording below this holds hardly a word.
_PIECE = Seconds(0.5)
# Parts of a speaker's utterances that are held out in turn, to see what learning is worth on speech it has not seen.
_FOLDS = 5
# Of the utterances that refine, one in so many says when to stop.
_CHOOSES = 4


@final
@dataclass(frozen=True, kw_only=True)
class Enrolment:
    """What to do.

    Args:
        how: ``predict`` needs no texts, ``learn`` does.  ``auto`` predicts, and learns where there are texts on which
            the prediction does not beat the base.
        refine: train all weights of the voice that comes out, starting from it; it wants texts.
        tenant: in the store.
        replace: whether a voice that nothing verified may take the place of one that has the name.
    """

    how: How = "auto"
    refine: bool = False
    learning: Learning = Learning()
    refining: Schedule = Schedule(rounds=60, lr=3e-3)
    tenant: str = TENANT
    licence: str | None = None
    replace: bool = False


@final
@dataclass(kw_only=True)
class Enrolled:
    """What came out for one speaker.

    Attributes:
        made_by: "embedding predicted" or "embedding learned".  voice: its hash; None if it was not kept.
        replaced: hash of the voice that had the name until now, if another one had.
        predicted, learned, refined: relative nats against the base (``refined``: against the voice before), measured on
            utterances that were not heard or learned from, except that ``refined`` chose among its rounds by them.
        moved: whether refining changed the voice after it was measured.  known: whether the space has learned from
            this speaker, so that what was measured is no proof.
        said: what was decided and why, in order.
    """

    name: str
    seconds: float
    utterances: int
    made_by: str = ""
    voice: str | None = None
    predicted: Difference | None = None
    learned: Difference | None = None
    refined: float | None = None
    moved: bool = False
    known: bool = False
    replaced: str | None = None
    said: list[str] = field(default_factory=list)

    @property
    def measured(self) -> Difference | None:
        """What is known of the embedding that was taken, against the base."""
        return self.predicted if self.made_by == "embedding predicted" else self.learned

    @property
    def verified(self) -> Difference | None:
        """What was measured of the voice itself, if that beats the base with its whole interval; None if not."""
        measured = self.measured
        return None if self.moved or self.known or measured is None or not measured.better else measured

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        verified = self.verified
        return asdict(self) | {"verified": None if verified is None else asdict(verified)}

    def text(self) -> str:
        """For people."""
        end = "nothing was stored"
        if self.voice is not None:
            end = f"stored{'' if self.verified else ' unverified'} as {self.name} ({self.voice[:12]})"
        if self.replaced is not None:
            end += f", in place of {self.replaced[:12]}"
        return "\n".join([f"{self.name}: {self.seconds:.1f} s in {self.utterances}", *self.said, end])


def enrol(
    base: str | Path, space: Path, name: str, speech: Corpus | Sequence[Recording], *, store: Store,
    wanted: Enrolment | None = None, watcher: Watcher | None = None,
) -> Enrolled:  # fmt: skip
    """A voice for one new speaker, put into the store if nothing speaks against it.

    Args: speech: utterances with texts, or sound alone.
    Raises: UsageError if texts or seconds are missing for what is asked, for the speech of several, and for a name that
        only a verified voice may take; VoiceError if the space is not of this base.
    """
    wanted, watcher = wanted or Enrolment(), watcher or Silent()
    # all that can be wrong with where it goes, before anything is computed
    quote(name)
    tenant_path(wanted.tenant)
    store.may_be_made()
    _check_speaker(name, speech)
    _check_name(name, speech, store, wanted)
    loaded = Space.load(base, space)
    if isinstance(speech, Corpus):
        found, voice = _Labelled(loaded, name, speech, wanted, watcher).run()
    else:
        found, voice = _heard(loaded, name, speech, wanted)
    if voice is not None and found.verified is None and not wanted.replace and (there := _holder(name, store, wanted)):
        found.said.append(
            f"the store has a voice of that name ({there[:12]}), and this one is unverified: give --replace to put it "
            "in its place, or another --name"
        )
    elif voice is not None:
        added = store.add_many([(name, voice)], wanted.tenant)[0]
        found.voice, found.replaced = added.hash, added.replaced
    return found


def _check_speaker(name: str, speech: Corpus | Sequence[Recording]) -> None:
    """UsageError for a manifest of several speakers: one voice for all of them would be nobody's."""
    if not isinstance(speech, Corpus):
        return
    speakers = sorted({u.speaker for u in speech if u.speaker is not None})
    if len(speakers) > 1:
        some = ", ".join(speakers[:_NAMED]) + (", ..." if len(speakers) > _NAMED else "")
        raise UsageError(
            f"{name}: the manifest has {len(speakers)} speakers ({some}), but enrol makes one voice of one speaker; "
            "give each a manifest of their own, or make voices of all of them with `manyvoice personalize`, which "
            "`manyvoice voices` then lists"
        )


def _check_name(name: str, speech: Corpus | Sequence[Recording], store: Store, wanted: Enrolment) -> None:
    """UsageError if nothing will verify the voice and another has its name; said before anything is computed."""
    if wanted.replace or isinstance(speech, Corpus) and not (len(speech) == 1 or wanted.refine):
        return
    if there := _holder(name, store, wanted):
        why = "refining changes it after it was measured" if wanted.refine else "there is nothing to verify it on"
        raise UsageError(
            f"{name}: the store has a voice of that name ({there[:12]}), and the new one would be unverified: "
            f"{why}; give --replace to put it in its place, or another --name"
        )


def _holder(name: str, store: Store, wanted: Enrolment) -> str:
    """The hash of the voice that has the name; empty if nobody has it, or there is no store yet."""
    try:
        return store.find(name, wanted.tenant) or ""
    except UsageError:
        return ""


def pieces(recordings: Sequence[Recording], log_mel: LogMel) -> tuple[list[Tensor], Seconds]:
    """Features T F of recordings cut at pauses, and how long they are together."""
    features, seconds = [], 0.0
    for recording in recordings:
        samples_N = recording.read(log_mel.rate)
        for start, stop in cut_at_pauses(samples_N, log_mel.rate, LONGEST):
            if stop - start >= _PIECE * log_mel.rate:
                features.append(log_mel(samples_N[start:stop]))
                seconds += (stop - start) / log_mel.rate
    return features, Seconds(seconds)


def _heard(space: Space, name: str, speech: Sequence[Recording], wanted: Enrolment) -> tuple[Enrolled, Voice | None]:
    if wanted.how == "learn" or wanted.refine:
        raise UsageError(
            f"{name}: sound alone cannot be learned from; give a manifest with texts, or leave --how and --refine away"
        )
    features, seconds = pieces(speech, space.variant.recogniser.log_mel)
    if seconds < SHORTEST:
        raise UsageError(_too_short(name, seconds))
    found = Enrolled(name=name, seconds=round(seconds, 2), utterances=len(speech), made_by="embedding predicted")
    own = space.predict(features)
    found.said += [
        _worth(space),
        "nothing was verified, because there are no texts: give some to know whether the voice is better than the base",
    ]
    bank = space.bank([name])
    space.generator.place(bank, 1, own)
    return found, space.generator.voice(bank, 1, _card(found, wanted))


@final
class _Labelled:
    """One speaker with texts."""

    def __init__(self, space: Space, name: str, corpus: Corpus, wanted: Enrolment, watcher: Watcher) -> None:
        self.space, self.name, self.corpus, self.wanted, self.watcher = space, name, corpus, wanted, watcher
        recogniser = space.variant.recogniser
        check(corpus, tokenizer=recogniser.tokenizer, encoder_frames=recogniser.encoder_frames).raise_if_bad()
        if len(corpus) == 0 or (wanted.refine and len(corpus) < 2):
            raise UsageError(f"{name}: {len(corpus)} utterances; give one at least, and two to refine")
        said = partial(watcher.progress, "listening")
        self.features = HeldFeatures(corpus, recogniser.log_mel, range(len(corpus)), said)
        held = max(1, len(corpus) // _CHOOSES) if wanted.refine else 0
        self.rows = tuple(range(len(corpus) - held))
        self.chooses = tuple(range(len(corpus) - held, len(corpus)))
        seconds = float(corpus.durations_N.sum())
        self.found = Enrolled(name=name, seconds=round(seconds, 2), utterances=len(corpus))
        if known := sorted({str(u.speaker) for u in corpus} & space.speakers):
            self.found.known = True
            self.found.said.append(
                f"the space has learned from {known[0]}, maybe from these very utterances: nothing below verifies the "
                "voice"
            )

    def run(self) -> tuple[Enrolled, Voice | None]:
        """What came out, and the voice if it is to be kept."""
        bank = self._predicted() if self.wanted.how != "learn" else None
        if bank is None:
            bank = self._learned()
        decided = self.found.measured
        if decided is not None and decided.relative >= 0:
            self.found.said.append(
                "the base is no worse for this speaker, so the voice is not kept; `manyvoice personalize` trains one "
                "outside the space"
            )
            return self.found, None
        if decided is not None and not decided.better:
            self.found.said.append(
                f"that is not better with its whole interval over {FEWEST} utterances or more, so it verifies nothing"
            )
        voice = self.space.generator.voice(bank, 1, _card(self.found, self.wanted))
        return self.found, self._refined(voice) if self.wanted.refine else voice

    def _predicted(self) -> Bank | None:
        """A bank with the predicted voice in row 1, if it is to be taken."""
        found = self.found
        must = self.wanted.how == "predict"
        if must and found.seconds < SHORTEST:
            raise UsageError(_too_short(found.name, found.seconds))
        if not must and not self._predictable():
            found.said.append("not predicted: the space has no predictor, or there are less than two seconds")
            return None
        speech, parts = self._speech(range(len(self.corpus)))
        bank = self.space.bank(list(speech))
        for row, rows in enumerate(speech.values(), start=1):
            self.space.generator.place(bank, row, self.space.predict([self.features.of(i, 0) for i in rows]))
        found.said.append(_worth(self.space))
        if parts:
            found.predicted = self._held_out(bank, parts)
            found.said.append(f"predicted against the base, from the other utterances: {found.predicted.sentence()}")
        else:
            found.said.append("predicted from one utterance: nothing was verified, because none is left to verify on")
        if not must and not (found.predicted is not None and found.predicted.better):
            found.said.append("that does not beat the base with its interval, so the voice is learned instead")
            return None
        found.made_by = "embedding predicted"
        return bank

    def _learned(self) -> Bank:
        """A bank with the learned voice in row 1; behind it those that have not seen a part of the utterances."""
        found = self.found
        found.made_by = "embedding learned"
        speech, parts = self._speech(self.rows)
        said = self.watcher.progress
        starts = self.space.starts(self.corpus, self.features, speech) if self._predictable() else {}
        found.said.append(
            "learning begins where the sound puts the speaker" if self.name in starts
            else "learning begins at the mean of the space's speakers"
        )  # fmt: skip
        bank = self.space.learn(
            self.corpus, self.features, speech, self.wanted.learning, lambda done, n, _: said("learning", done, n),
            starts=starts,
        )  # fmt: skip
        if parts:
            found.learned = self._held_out(bank, parts)
            found.said.append(f"learned against the base, on held-out utterances: {found.learned.sentence()}")
        else:
            found.said.append(
                "learned from one utterance: nothing was verified, because none is left to verify on; give more to "
                "know whether the voice is better than the base"
            )
        return bank

    def _predictable(self) -> bool:
        """Whether the sound alone says something."""
        return self.space.generator.predictor is not None and self.found.seconds >= SHORTEST

    def _speech(self, rows: Sequence[int]) -> tuple[dict[str, list[int]], list[Sequence[int]]]:
        """Utterances of the speaker, then of whoever lacks one part of them; and the parts, if there are two or more.

        The first is to be the voice; the others have not heard what they are compared on.
        """
        count = min(_FOLDS, len(rows))
        parts = [rows[k::count] for k in range(count)] if count > 1 else []
        without = {f"{self.name} without part {k}": [i for i in rows if i not in p] for k, p in enumerate(parts)}
        return {self.name: list(rows)} | without, parts

    def _refined(self, voice: Voice) -> Voice:
        """The voice after training all of its weights, if that is better on the utterances that choose."""
        found = self.found
        bank, (best,) = self.space.refine(
            self.corpus, self.features, {self.name: voice}, [Speech(adapt=self.rows, choose=self.chooses)],
            self.wanted.refining, self.wanted.learning, lambda done, n, _: self.watcher.progress("refining", done, n),
        )  # fmt: skip
        start = best.history[0][1]
        found.refined = best.nats / max(start, 1e-9) - 1
        count = len(self.chooses)
        if best.round == 0:
            found.said.append(f"refining made it no better on the {count} that choose, so it stays as it was")
            return voice
        found.moved = True
        found.said += [
            f"refined, on the {count} that chose the round: {found.refined:+.1%} nats against the voice before",
            "the refined voice is unverified: what was compared with the base is the voice before, and the utterances "
            "that are left chose the round",
        ]
        before = voice.card["verified"]
        card = {**voice.card, "refined": True, "refined_rounds": best.round, "verified": None,
                "verified_before_refining": before}  # fmt: skip
        return Voice(method=voice.method, tensors=bank.take(1), base=voice.base, tokenizer=voice.tokenizer, card=card)

    def _held_out(self, bank: Bank, parts: Sequence[Sequence[int]]) -> Difference:
        """Each part with the row that has not seen it, rows 2 and on, against the base."""
        rows = [i for part in parts for i in part]
        owners = [2 + k for k, part in enumerate(parts) for _ in part]
        sides = [
            self.space.evaluate(self.corpus, self.features, bank, rows, of).nats for of in (owners, [0] * len(owners))
        ]
        return Difference.of(*sides)


def _too_short(name: str, seconds: float) -> str:
    return f"{name}: {seconds:.1f} s of sound; a voice is predicted from {SHORTEST:g} s or more"


def _card(found: Enrolled, wanted: Enrolment) -> dict[str, Any]:
    verified = found.verified
    return {
        "speaker": found.name, "made_by": found.made_by, "licence": wanted.licence, "seconds": found.seconds,
        "utterances": found.utterances,
        "verified": None if verified is None else {
            "relative_nats": verified.relative, "interval": list(verified.interval), "utterances": verified.units},
    }  # fmt: skip


def _worth(space: Space) -> str:
    predictor = space.generator.predictor
    assert predictor is not None, "there is a prediction"
    return worth_of_prediction(predictor.r2, f"{predictor.speakers} training speakers left out")
