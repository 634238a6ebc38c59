"""Personalise a base for all speakers of a manifest in one job: split, train together, keep what helps, store, report.

output/personalize.json   settings          output/split.json      which utterances learn, choose and report
output/speakers.jsonl     a line a speaker  output/report.json     what came out, and report.md for people

Weights are nowhere in this folder but in the store, so that removing a voice there removes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from manyvoice.data.augment import Augment
from manyvoice.data.check import check
from manyvoice.data.collate import Collator, Features, HeldFeatures, Picked
from manyvoice.data.manifest import Corpus
from manyvoice.decode.evaluate import evaluate, group_of
from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.narrow import Elastic
from manyvoice.errors import UsageError, VoiceError, WorkError
from manyvoice.recipes.personal_report import Measured, Outcome, Report, summarise
from manyvoice.recipes.sizes import Size, read_sizes
from manyvoice.recipes.speakers import Speaker, Split, split_speakers, split_text
from manyvoice.recipes.variant import owned_by, owned_loss, whole_variant
from manyvoice.recipes.watch import Silent, Watcher
from manyvoice.submodels.bank import Bank, bytes_per_row
from manyvoice.submodels.method import Edit, make_method
from manyvoice.submodels.names import tenant_path
from manyvoice.submodels.store import Added, Store
from manyvoice.submodels.voice import Voice
from manyvoice.train import distributed
from manyvoice.train.halfway import Halfway, digest_of, forget_all, halfway_of
from manyvoice.train.owners import Best, OwnerTraining, Schedule, Speech
from manyvoice.types import Batch

SETTINGS, SPLIT, LINES, REPORT = "personalize.json", "split.json", "speakers.jsonl", "report.json"
# A row in training: itself, two moments and the best it has been; gradients are as large as a step.
_COPIES = 4
# Held features, in bytes for each second of speech: 80 bins of two bytes, a hundred times a second.
_BYTES_PER_SECOND = 16_000
# One in so many of the general utterances measures what a voice forgets, and so many at most.
_MEASURES, _OTHERS = 10, 20
_CLEARLY = 1.645  # standard deviations


@final
@dataclass(frozen=True, kw_only=True)
class Personalisation:
    """What to do.

    Args:
        method, settings: of the submodels.
        by: field of the manifest that tells speakers apart.
        lrs: rates to choose from; each speaker trains once with each, all together.
        masks: SpecAugment while learning.
        sizes: train while a supernet's sizes are sampled, so that voices work on all of them.
        replay: utterances of general speech in a step, as a share of the owner's own.  worse: a voice that makes the
            loss on general speech larger by this share is not kept.
        better: a voice is kept if it makes the loss on what chooses smaller by this share at least: its best round was
            chosen there too, and that flatters it.
        memory: bytes that a bank in training may take; more speakers are trained in waves.
        tenant: in the store.
    """

    method: str = "adapter"
    settings: dict[str, Any] = field(default_factory=dict)
    by: str = "speaker"
    split: Split = Split()
    schedule: Schedule = Schedule()
    lrs: tuple[float, ...] = ()
    masks: bool = True
    sizes: bool = False
    replay: float = 0.25
    worse: float = 0.1
    better: float = 0.05
    memory: int = 2**31
    seed: int = 0
    tenant: str = "default"
    licence: str | None = None

    def __post_init__(self) -> None:
        if len({f"{lr:g}" for lr in self.lrs}) < len(self.lrs) or any(lr <= 0 for lr in self.lrs):
            raise UsageError(f"lrs = {list(self.lrs)}: must be above 0 and no two the same; name each rate once")
        for name, value, least in (("rounds", self.schedule.rounds, 1), ("lr", self.schedule.lr, 1e-12)):
            if value < least:
                usual = getattr(Schedule, name)
                raise UsageError(f"schedule.{name} = {value}: must be {least:g} or more; {usual:g} is usual")
        if not 0 <= self.better < 1:
            raise UsageError(f"better = {self.better}: must be a share below 1; {Personalisation.better} is usual")
        if self.replay < 0:
            raise UsageError(f"replay = {self.replay}: must be 0 or more; {Personalisation.replay} is usual")

    @property
    def replayed(self) -> int:
        """Utterances of general speech in a step; a share that is not 0 is one at least."""
        return max(1, round(self.replay * self.schedule.utterances)) if self.replay else 0


def personalize(
    base: str | Path,
    corpus: Corpus,
    output: Path,
    wanted: Personalisation | None = None,
    *,
    store: Store | None = None,
    general: Corpus | None = None,
    watcher: Watcher | None = None,
    dry_run: bool = False,
) -> Report:
    """A voice for every speaker that it helps; what an interrupted run has finished is used again.

    Under torchrun each process trains its share of the speakers.

    Args: store: ``output/voices`` if not given.  general: speech of others that a voice must not forget, to learn from
        and to be measured on; without it other speakers of the manifest measure, and no voice is refused for it.
        dry_run: see who has enough speech; nothing is trained or written.
    Raises: UsageError if the folder is of another run; CorpusError for a manifest without speakers, with bad rows, or
        with texts that the base cannot write; WorkError if a speaker's loss is not finite, or the folder cannot be
        written.
    """
    wanted = wanted or Personalisation()
    accelerator = distributed.start("fp32")
    main = accelerator.is_main_process
    watcher = watcher if main and watcher is not None else Silent()
    job = Personalising(base, corpus, output, wanted, general, watcher, device=str(accelerator.device))
    if dry_run:
        return job.plan()
    store = store or Store(output / "voices")
    rank, ranks = accelerator.process_index, accelerator.num_processes
    waves = job.waves(job.speakers[rank::ranks])
    if main:
        job.claim(store)
    accelerator.wait_for_everyone()
    job.run(store, waves, rank)
    accelerator.wait_for_everyone()
    report = job.report(store)
    if main:
        # a process of an earlier start may have left voices; from here on weights are in the store alone
        forget_all(output)
        report.write(output)
    accelerator.wait_for_everyone()
    distributed.stop_group()
    return report


@final
class Personalising:
    """One job's parts. Use :func:`personalize`."""

    def __init__(
        self, base: str | Path, corpus: Corpus, output: Path, wanted: Personalisation, general: Corpus | None,
        watcher: Watcher, *, device: str,
    ) -> None:  # fmt: skip
        self.corpus, self.output, self.wanted, self.watcher = corpus, output, wanted, watcher
        recogniser = Recogniser.load(base, device=device)
        for p in recogniser.model.parameters():
            p.requires_grad_(False)
        self.variant = whole_variant(recogniser)
        self.method: Edit = make_method(wanted.method, wanted.settings)
        if self.method.alone() != self.method:
            raise UsageError(
                f"method {wanted.method}: its voices share tensors, so they are made by an embedding space; see "
                "docs/voices.md, or take adapter, lora or scale"
            )
        self.sizes = _sizes_of(recogniser) if wanted.sizes else None
        for some in (corpus,) if general is None else (corpus, general):
            check(some, tokenizer=recogniser.tokenizer, encoder_frames=recogniser.encoder_frames).raise_if_bad()
        if general is not None:
            _refuse_the_same(corpus, general)
        self.speakers, self.left_out = split_speakers(corpus, wanted.by, wanted.split)
        if not self.speakers:
            name, why = next(iter(self.left_out.items()))
            raise UsageError(f"nobody has enough speech: {name} has {why}; three utterances of a speaker at least")
        if nobodys := sum(group_of(u, wanted.by) is None for u in corpus):
            watcher.note(f"{nobodys} of {len(corpus)} utterances do not say their {wanted.by!r} and are left out")
        # one corpus, so that rows name utterances of either
        self.everything = corpus if general is None else corpus + general
        self.general = tuple(range(len(corpus), len(self.everything)))
        self.tokens = [recogniser.tokenizer.encode(t) for t in self.everything.texts()]

    def plan(self) -> Report:
        """Who would be trained on how much."""
        planned = {s.name: (len(s.adapt), len(s.choose), len(s.test)) for s in self.speakers}
        return replace(summarise([], self.left_out, self._settings()), planned=planned)

    def claim(self, store: Store) -> None:
        """Write what the run is, or see that the folder is of this run; the store is made now, not after training."""
        settings = self._settings() | {"corpus": self.everything.fingerprint, "store": store.url}
        texts = {
            SETTINGS: json.dumps(settings, ensure_ascii=False, indent=1, default=str) + "\n",
            # which field tells speakers or parts apart is not in the fingerprint of a corpus
            SPLIT: split_text(self.corpus, self.speakers),
        }
        tenant_path(self.wanted.tenant)
        try:
            for name, text in texts.items():
                path = self.output / name
                if path.exists() and path.read_text(encoding="utf-8") != text:
                    raise UsageError(f"{path} is of a run with other settings, base or data; choose another --output")
            self.output.mkdir(parents=True, exist_ok=True)
            store.make()
            for name, text in texts.items():
                (self.output / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise WorkError(f"{self.output}: cannot be written ({error}); choose another --output") from error

    def run(self, store: Store, waves: Sequence[Sequence[Speaker]], rank: int) -> None:
        """Train and store the speakers of each wave that are not finished."""
        done = {o.speaker for o in self.outcomes()}
        lines = self.output / (LINES if rank == 0 else f"speakers-{rank}.jsonl")
        keep_whole_lines(lines)
        for number, everyone in enumerate(waves, start=1):
            left = [s for s in everyone if s.name not in done]
            if not left:
                continue
            # one that was stopped while its voices were stored is trained already
            wave = everyone if self._halfway(everyone, rank).there() else left
            label = f"wave {number} of {len(waves)}: " if len(waves) > 1 else ""
            count = "1 speaker" if len(left) == 1 else f"{len(left)} speakers"
            self.watcher.note(f"{label}{count}, " + ", ".join(s.name for s in left[:5]) + ", ..." * (len(left) > 5))
            for outcome in self._wave(store, wave, done, label, self._halfway(wave, rank)):
                try:
                    with lines.open("a", encoding="utf-8") as file:
                        file.write(outcome.to_json())
                except OSError as error:
                    raise WorkError(f"{lines}: cannot be written ({error}); make room and run it again") from error

    def outcomes(self) -> list[Outcome]:
        """Speakers that are finished; a line that was cut off is not."""
        found = {}
        for path in [self.output / LINES, *sorted(self.output.glob("speakers-*.jsonl"))]:
            # not splitlines: a name may hold other ends of lines
            for line in path.read_bytes().split(b"\n") if path.exists() else ():
                try:
                    outcome = Outcome.from_json(line.decode())
                except (ValueError, TypeError):
                    continue
                found[outcome.speaker] = outcome
        return [found[s.name] for s in self.speakers if s.name in found]

    def report(self, store: Store) -> Report:
        """Of all speakers that are finished, as the store is now: a voice that was removed serves nobody."""
        outcomes = [_as_stored(outcome, store, self.wanted.tenant) for outcome in self.outcomes()]
        return summarise(outcomes, self.left_out, self._settings())

    def _settings(self) -> dict[str, Any]:
        # how much memory there is changes no voice
        return {k: v for k, v in asdict(self.wanted).items() if k != "memory"} | {"base": self.variant.base}

    def waves(self, speakers: Sequence[Speaker]) -> list[list[Speaker]]:
        """These speakers in parts that fit into memory. UsageError names one who does not fit alone."""
        return list(self._waves(speakers))

    def _waves(self, speakers: Sequence[Speaker]) -> Iterator[list[Speaker]]:
        one = bytes_per_row(self.variant.anatomy, self.method, torch.float32) * _COPIES * len(self._rates())
        always = self._bytes(self.general or [i for _, i in self._others()])
        wave: list[Speaker] = []
        held = 0.0
        for speaker in speakers:
            size = one + self._bytes((*speaker.adapt, *speaker.choose))
            if always + size > self.wanted.memory:
                raise UsageError(
                    f"--memory: {self.wanted.memory / 2**20:.3g} MiB do not hold {speaker.name}'s speech and submodel, "
                    f"{size / 2**20:.3g} MiB, beside {always / 2**20:.3g} MiB of speech of others; give more"
                )
            if wave and always + held + size > self.wanted.memory:
                yield wave
                wave, held = [], 0.0
            wave.append(speaker)
            held += size
        if wave:
            yield wave

    def _bytes(self, rows: Sequence[int]) -> float:
        return _BYTES_PER_SECOND * float(self.everything.durations_N[list(rows)].sum())

    def _candidates(self, wave: Sequence[Speaker]) -> dict[str, tuple[Speaker, float]]:
        """The rows of a wave's bank, by the owner's name: every speaker with every rate."""
        first = self._rates()[0]
        # no name holds a line's end and a rate
        return {s.name if lr == first else f"{s.name}\nat {lr:g}": (s, lr) for s in wave for lr in self._rates()}

    def _halfway(self, wave: Sequence[Speaker], rank: int) -> Halfway:
        owners = list(self._candidates(wave))
        key = digest_of(self._settings(), self.everything.fingerprint, owners)
        return Halfway(halfway_of(self.output, rank), key)

    def _wave(
        self, store: Store, wave: Sequence[Speaker], done: Set[str], label: str, halfway: Halfway
    ) -> Iterator[Outcome]:
        # what reports is listened to again then: it is heard twice in all, and in full precision
        rows = {i for s in wave for i in (*s.adapt, *s.choose)} | set(self.general) | {i for _, i in self._others()}
        said = partial(self.watcher.progress, f"{label}listening")
        features = HeldFeatures(self.everything, self.variant.recogniser.log_mel, sorted(rows), said)
        candidates = self._candidates(wave)
        device = self.variant.recogniser.device
        bank = Bank(self.variant.anatomy, self.method, list(candidates), seed=self.wanted.seed, device=device)
        augment = Augment(freq_masks=2, time_masks=2) if self.wanted.masks else None
        collator = Collator(self.everything, features, self.tokens, augment=augment, seed=self.wanted.seed)
        replayed = self.wanted.replayed if self.general else 0
        job = OwnerTraining(
            bank,
            [Speech(adapt=s.adapt, choose=s.choose, replay=self._replay(), lr=lr) for s, lr in candidates.values()],
            collator, self._losses, self._nats,
            replace(self.wanted.schedule, replayed=replayed), seed=self.wanted.seed,
        )  # fmt: skip
        train = partial(self.watcher.progress, f"{label}training")
        best = job.run(lambda round, n, active: train(round if active else n, n), halfway)
        if len(wave) == len(self.speakers):
            job.raise_if_all_lost()
        yield from self._judge(store, wave, done, job, best, label)
        # not before all are stored: a store that is full or stopped meanwhile has cost no training
        halfway.remove()

    def _rates(self) -> tuple[float, ...]:
        return self.wanted.lrs or (self.wanted.schedule.lr,)

    def _replay(self) -> tuple[int, ...]:
        """General utterances that do not measure."""
        return tuple(i for k, i in enumerate(self.general) if k % _MEASURES)

    def _losses(self, bank: Bank, batch: Batch, round: int) -> Iterator[Tensor]:
        """Of the whole model, and with sizes of one more in turn, each half."""
        if self.sizes is None:
            yield self._loss(bank, batch)
            return
        yield self._loss(bank, batch) / 2
        elastic, sizes = self.sizes
        yield self._loss(bank, batch, elastic, sizes[1 + round % (len(sizes) - 1)]) / 2

    def _loss(self, bank: Bank, batch: Batch, elastic: Elastic | None = None, size: Size | None = None) -> Tensor:
        if elastic is None or size is None:
            return owned_loss(self.variant, bank, batch)
        narrowed = elastic.at(size.subnet, statistics=size.statistics)
        return owned_loss(self.variant, bank, batch, slices=elastic.plan(size.subnet).slices, inside=narrowed)

    @torch.no_grad()
    def _nats(self, bank: Bank, batch: Batch) -> Tensor:
        return self._loss(bank, batch)

    def _judge(
        self, store: Store, wave: Sequence[Speaker], done: Set[str], job: OwnerTraining, best: dict[int, Best],
        label: str,
    ) -> Iterator[Outcome]:  # fmt: skip
        """The best candidate of each speaker who is not done, against the base; what helps is stored."""
        rates = self._rates()
        rows = {}
        for k, speaker in enumerate(wave):
            candidates = range(1 + k * len(rates), 1 + (k + 1) * len(rates))
            if speaker.name not in done:
                rows[speaker.name] = min(candidates, key=lambda row: best[row].nats)
        wave = [speaker for speaker in wave if speaker.name in rows]
        measure, held = partial(self._measure, job.bank), job.collator.features
        choose, test = ([(s.name, i) for s in wave for i in getattr(s, part)] for part in ("choose", "test"))
        chosen = [measure(owners, choose, f"{label}judging", held) for owners in ({}, rows)]
        before, after = (measure(owners, test, f"{label}measuring") for owners in ({}, rows))
        others = self._on_others(job, rows)
        for speaker in wave:
            name, row = speaker.name, rows[speaker.name]
            nats = best[row].history[0][1], best[row].nats
            wrong = [one[name].character_errors for one in chosen]
            why = reasons_against(nats, wrong, others.get(name) if self.general else None, self.wanted)
            said = []
            if row in job.lost:
                said.append(f"its loss was not finite in round {job.lost[row]}, so it stopped there")
            outcome = Outcome(
                speaker=name, kept=not why, why="; ".join(why), lr=rates[(row - 1) % len(rates)],
                round=best[row].round, adapt_seconds=self._seconds(speaker.adapt), adapt_utterances=len(speaker.adapt),
                choose_nats=nats, others=others.get(name), before=before[name], after=after[name],
            )  # fmt: skip
            if outcome.kept:
                added = self._store(store, outcome, job.bank, row)
                outcome = replace(outcome, voice=added.hash)
                if added.replaced is not None:
                    older = added.replaced[:12]
                    said.append(f"its voice takes the place of {older}, which the store had under that name")
            elif there := store.find(name, self.wanted.tenant):
                said.append(f"no new voice; {there[:12]}, an older one, stays in the store under that name")
            yield replace(outcome, said=tuple(said))

    def _store(self, store: Store, outcome: Outcome, bank: Bank, row: int) -> Added:
        metrics = {"base_wer": outcome.before.wer, "wer": outcome.after.wer, "words": sum(outcome.before.words)}
        card = {
            "speaker": outcome.speaker,
            "licence": self.wanted.licence,
            "seconds": outcome.adapt_seconds,
            "shared": False,
            "metrics": metrics,
        }
        voice = Voice(
            method=self.method, tensors=bank.take(row), base=self.variant.base,
            tokenizer=self.variant.recogniser.tokenizer.fingerprint(), card=card,
        )  # fmt: skip
        return store.add_many([(outcome.speaker, voice)], self.wanted.tenant)[0]

    def _seconds(self, rows: Sequence[int]) -> float:
        return round(float(self.corpus.durations_N[list(rows)].sum()), 2)

    def _measure(
        self, bank: Bank, rows: Mapping[str, int], utterances: Sequence[tuple[str, int]], label: str,
        held: Features | None = None,
    ) -> dict[str, Measured]:  # fmt: skip
        """Every speaker on the utterances given with his name, in mixed batches; without a row on the base."""
        indices = [i for _, i in utterances]
        found = evaluate(
            self.variant.recogniser,
            self.everything.subset(indices),
            features=None if held is None else Picked(held, indices),
            owned=owned_by(self.variant, bank, [rows.get(name, 0) for name, _ in utterances]),
            progress=partial(self.watcher.progress, label),
        )
        places: dict[str, list[int]] = {}
        for k, (name, _) in enumerate(utterances):
            places.setdefault(name, []).append(k)
        return {name: Measured.of(found, mine) for name, mine in places.items()}

    def _others(self) -> list[tuple[str, int]]:
        """What measures forgetting, with whose it is: some general utterances, or one of some speakers each.

        The same for every wave and process, so that a verdict does not depend on who is trained together.
        """
        if self.general:
            return [("", i) for i in self.general[::_MEASURES][:_OTHERS]]
        return [(s.name, s.choose[0]) for s in self.speakers[: _OTHERS + 1]]

    def _on_others(self, job: OwnerTraining, rows: Mapping[str, int]) -> dict[str, float]:
        """How much larger each voice makes the loss on others' speech, relative to the base; none if there is none."""
        others = self._others()
        heard = {name: [i for whose, i in others if whose != name][:_OTHERS] for name in rows}
        heard = {name: indices for name, indices in heard.items() if indices}
        if not heard:
            return {}
        indices = [i for _, i in others]
        picked = Picked(job.collator.features, indices)
        found = evaluate(self.variant.recogniser, self.everything.subset(indices), features=picked)
        base = dict(zip(indices, zip(found.nats, found.tokens, strict=True), strict=True))
        after = job.nats_of({rows[name]: mine for name, mine in heard.items()})
        grown = {}
        for name, mine in heard.items():
            before = sum(base[i][0] for i in mine) / max(1, sum(base[i][1] for i in mine))
            grown[name] = after[rows[name]] / max(before, 1e-9) - 1
        return grown


def _as_stored(outcome: Outcome, store: Store, tenant: str) -> Outcome:
    """An outcome as the store tells it today."""
    if not outcome.kept:
        return outcome
    try:
        now = store.find(outcome.speaker, tenant)
    except VoiceError as error:
        return replace(outcome, said=(*outcome.said, str(error)))
    if now is None:
        return replace(
            outcome, kept=False, why=f"its voice {(outcome.voice or '')[:12]} was removed from the store since"
        )
    if now != outcome.voice:
        return replace(outcome, said=(*outcome.said, f"since then {now[:12]} has taken its place in the store"))
    return outcome


def keep_whole_lines(path: Path) -> None:
    """Cut off what a killed process left of a last line, which would spoil the next one."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _refuse_the_same(corpus: Corpus, general: Corpus) -> None:
    # by what is heard: another manifest may give the same sound another id
    known = {u.audio.describe() for u in corpus}
    if same := [u.id for u in general if u.audio.describe() in known]:
        raise UsageError(
            f"general: {len(same)} of its utterances, such as {same[0]}, are of the speakers to personalise for; leave "
            "them out, or what is reported would have been learned from"
        )


def reasons_against(
    nats: tuple[float, float], errors: Sequence[Sequence[int]], others: float | None, wanted: Personalisation
) -> list[str]:
    """Why a voice is not kept: nothing learned, clearly more errors where it was chosen, or others' speech forgotten.

    Clearly is more than 1.64 sqrt(e0 + e1), the one-sided 95 % bound of what two equal Poisson counts differ by: a few
    sentences tell a lower loss from a higher one, but not a few wrong characters more from as many fewer.

    Args: nats: per token on what chose, of the base and of the voice.  errors: there, of both.
    """
    found = []
    before, after = map(sum, errors)
    # negated, so that what is no number is no better
    if not nats[1] < nats[0]:
        found.append("no better than the base on the utterances that choose")
    elif nats[1] > (1 - wanted.better) * nats[0]:
        found.append(
            f"{1 - nats[1] / nats[0]:.1%} better than the base on the utterances that choose, less than the "
            f"{wanted.better:.0%} asked for"
        )
    elif after - before > _CLEARLY * (before + after) ** 0.5:
        found.append("clearly more wrong characters than the base on the utterances that choose")
    if others is not None and not others <= wanted.worse:
        found.append(f"the loss on speech of others grew by {others:.0%}, more than the {wanted.worse:.0%} allowed")
    return found


def _sizes_of(recogniser: Recogniser) -> tuple[Elastic, list[Size]]:
    assert recogniser.folder is not None, "loaded from a folder"
    sizes = read_sizes(recogniser.folder, recogniser)
    if len(sizes) < 2:
        raise UsageError(
            f"--sizes: {recogniser.folder} has no sizes to train across; leave it away, or take a supernet"
        )
    return Elastic(recogniser.model), sizes
