"""Personalise a base for all speakers of a manifest in one job: split, train together, keep what helps, store, report.

output/personalize.json   settings          output/split.json      which utterances learn, choose and report
output/speakers.jsonl     a line a speaker  output/report.json     what came out, and report.md for people

Weights are nowhere in this folder but in the store, so that removing a voice there removes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from manyvoice.data.augment import Augment
from manyvoice.data.check import check
from manyvoice.data.collate import Collator, HeldFeatures, Picked
from manyvoice.data.manifest import Corpus
from manyvoice.decode.evaluate import evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.narrow import Elastic
from manyvoice.errors import UsageError
from manyvoice.recipes.personal_report import Measured, Outcome, Report, summarise
from manyvoice.recipes.sizes import Size, read_sizes
from manyvoice.recipes.speakers import Speaker, Split, split_speakers, write_split
from manyvoice.recipes.variant import owned_by, whole_variant
from manyvoice.recipes.watch import Silent, Watcher
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.method import Edit, make_method
from manyvoice.submodels.store import Store
from manyvoice.submodels.voice import Voice
from manyvoice.train import distributed
from manyvoice.train.objective import ctc_per_utterance, scores_of
from manyvoice.train.owners import Best, OwnerTraining, Schedule, Speech
from manyvoice.types import Batch

SETTINGS, SPLIT, LINES, REPORT = "personalize.json", "split.json", "speakers.jsonl", "report.json"
# A row in training: itself, two moments and the best it has been; gradients are as large as a step.
_COPIES = 4
# Held features, in bytes for each second of speech: 80 bins of two bytes, a hundred times a second.
_BYTES_PER_SECOND = 16_000
# One in so many of the general utterances measures what a voice forgets, and so many at most.
_MEASURES, _OTHERS = 10, 20


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
        replay: share of an owner's step that is speech of others.  worse: a voice that makes the loss on others'
            speech larger by this share is not kept.
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
    memory: int = 2**31
    seed: int = 0
    tenant: str = "default"
    licence: str | None = None


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
        and to be measured on; without it other speakers of the manifest measure.  dry_run: see who has enough speech;
        nothing is trained or written.
    Raises: UsageError if the folder is of another run; CorpusError for a manifest without speakers, with bad rows, or
        with texts that the base cannot write; WorkError if a speaker's loss is not finite.
    """
    wanted = wanted or Personalisation()
    accelerator = distributed.start("fp32")
    main = accelerator.is_main_process
    job = Personalising(base, corpus, output, wanted, general, (watcher or Silent()) if main else Silent())
    if dry_run:
        planned = {s.name: (len(s.adapt), len(s.choose), len(s.test)) for s in job.speakers}
        return replace(job.report(), planned=planned)
    if main:
        job.claim()
    accelerator.wait_for_everyone()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    job.run(store or Store(output / "voices"), job.speakers[rank::ranks], rank)
    accelerator.wait_for_everyone()
    report = job.report()
    if main:
        report.write(output)
    accelerator.wait_for_everyone()
    distributed.stop_group()
    return report


@final
class Personalising:
    """One job's parts. Use :func:`personalize`."""

    def __init__(
        self, base: str | Path, corpus: Corpus, output: Path, wanted: Personalisation, general: Corpus | None,
        watcher: Watcher,
    ) -> None:  # fmt: skip
        self.corpus, self.output, self.wanted, self.watcher = corpus, output, wanted, watcher
        recogniser = Recogniser.load(base)
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
        check(corpus, tokenizer=recogniser.tokenizer, encoder_frames=recogniser.encoder_frames).raise_if_bad()
        self.speakers, self.left_out = split_speakers(corpus, wanted.by, wanted.split)
        if not self.speakers:
            why = next(iter(self.left_out.values()))
            raise UsageError(f"nobody has enough speech: {why}; three utterances of a speaker at least")
        # one corpus, so that rows name utterances of either
        self.everything = corpus if general is None else corpus + general
        self.general = tuple(range(len(corpus), len(self.everything)))
        self.tokens = [recogniser.tokenizer.encode(t) for t in self.everything.texts()]

    def claim(self) -> None:
        """Write what the run is, or see that the folder is of this run."""
        settings = asdict(self.wanted) | {"base": self.variant.base, "corpus": self.everything.fingerprint}
        text = json.dumps(settings, ensure_ascii=False, indent=1, default=str) + "\n"
        path = self.output / SETTINGS
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UsageError(f"{path} is of a run with other settings, base or data; choose another --output")
        self.output.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        write_split(self.output / SPLIT, self.corpus, self.speakers)

    def run(self, store: Store, speakers: Sequence[Speaker], rank: int) -> None:
        """Train and store these speakers, in waves that fit into memory."""
        done = {o.speaker for o in self.outcomes()}
        left = [s for s in speakers if s.name not in done]
        lines = self.output / (LINES if rank == 0 else f"speakers-{rank}.jsonl")
        waves = list(self._waves(left))
        for number, wave in enumerate(waves, start=1):
            self.watcher.note(f"wave {number} of {len(waves)}: {len(wave)} speakers")
            for outcome in self._wave(store, wave):
                with lines.open("a", encoding="utf-8") as file:
                    file.write(outcome.to_json())

    def outcomes(self) -> list[Outcome]:
        """Speakers that are finished; a line that was cut off is not."""
        found = {}
        for path in [self.output / LINES, *sorted(self.output.glob("speakers-*.jsonl"))]:
            for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
                try:
                    outcome = Outcome.from_json(line)
                except (ValueError, TypeError):
                    continue
                found[outcome.speaker] = outcome
        return [found[s.name] for s in self.speakers if s.name in found]

    def report(self) -> Report:
        """Of all speakers that are finished."""
        return summarise(self.outcomes(), self.left_out, asdict(self.wanted) | {"base": self.variant.base})

    def _waves(self, speakers: Sequence[Speaker]) -> Iterator[list[Speaker]]:
        one = Bank(self.variant.anatomy, self.method, ["x"], empty=True).bytes_per_owner * _COPIES * len(self._rates())
        room = self.wanted.memory - _BYTES_PER_SECOND * float(self.everything.durations_N[list(self.general)].sum())
        wave: list[Speaker] = []
        held = 0.0
        for speaker in speakers:
            size = one + _BYTES_PER_SECOND * float(self.corpus.durations_N[list(speaker.rows())].sum())
            if size > room:
                raise UsageError(
                    f"--memory: {self.wanted.memory / 2**20:.0f} MiB do not hold {speaker.name}'s speech and submodel, "
                    f"{size / 2**20:.0f} MiB; give more"
                )
            if wave and held + size > room:
                yield wave
                wave, held = [], 0.0
            wave.append(speaker)
            held += size
        if wave:
            yield wave

    def _wave(self, store: Store, wave: Sequence[Speaker]) -> Iterator[Outcome]:
        rows = sorted({i for s in wave for i in s.rows()} | set(self.general))
        said = partial(self.watcher.progress, "listening")
        features = HeldFeatures(self.everything, self.variant.recogniser.log_mel, rows, said)
        rates = self._rates()
        candidates = [(s, lr) for s in wave for lr in rates]
        owners = [s.name if lr == rates[0] else f"{s.name} at {lr:g}" for s, lr in candidates]
        bank = Bank(self.variant.anatomy, self.method, owners, seed=self.wanted.seed)
        augment = Augment(freq_masks=2, time_masks=2) if self.wanted.masks else None
        collator = Collator(self.everything, features, self.tokens, augment=augment, seed=self.wanted.seed)
        replayed = round(self.wanted.replay * self.wanted.schedule.utterances) if self.general else 0
        job = OwnerTraining(
            bank,
            [Speech(adapt=s.adapt, choose=s.choose, replay=self._replay(), lr=lr) for s, lr in candidates],
            collator, self._losses, self._nats,
            replace(self.wanted.schedule, replayed=replayed), seed=self.wanted.seed,
        )  # fmt: skip
        best = job.run(lambda done, n, left: self.watcher.progress(f"training, {left} left", done, n))
        yield from self._judge(store, wave, job, best, features)

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
        size = sizes[1 + round % (len(sizes) - 1)]
        with elastic.at(size.subnet, statistics=size.statistics):
            yield self._loss(bank, batch, slices=elastic.plan(size.subnet).slices) / 2

    def _loss(self, bank: Bank, batch: Batch, **more: Any) -> Tensor:
        recogniser = self.variant.recogniser
        with bank.on(recogniser.model, batch.owner_B, **more):
            scores = scores_of(recogniser.model, batch)
        blank = recogniser.family.blank(recogniser.model)
        return ctc_per_utterance(scores, batch.tokens_BU, batch.token_len_B, blank)

    @torch.no_grad()
    def _nats(self, bank: Bank, batch: Batch) -> Tensor:
        return self._loss(bank, batch)

    def _judge(
        self, store: Store, wave: Sequence[Speaker], job: OwnerTraining, best: dict[int, Best], features: HeldFeatures
    ) -> Iterator[Outcome]:
        """Each speaker's best candidate against the base; what helps is stored."""
        rates = self._rates()
        rows = {}
        for k, speaker in enumerate(wave):
            candidates = range(1 + k * len(rates), 1 + (k + 1) * len(rates))
            rows[speaker.name] = min(candidates, key=lambda row: best[row].nats)
        measure = partial(self._measure, job.bank, features, wave)
        test, choose = ((measure({}, part), measure(rows, part)) for part in ("test", "choose"))
        others = self._on_others(job, wave, rows)
        for speaker in wave:
            name, row = speaker.name, rows[speaker.name]
            before, after = (part[name] for part in test)
            nats = best[row].history[0][1], best[row].nats
            why = reasons_against(nats, [part[name].errors for part in choose], others.get(name), self.wanted.worse)
            outcome = Outcome(
                speaker=name, kept=not why, why="; ".join(why), lr=rates[(row - 1) % len(rates)],
                round=best[row].round, adapt_seconds=self._seconds(speaker.adapt), adapt_utterances=len(speaker.adapt),
                choose_nats=nats, others=others.get(name), before=before, after=after,
            )  # fmt: skip
            yield replace(outcome, voice=self._store(store, outcome, job.bank, row)) if outcome.kept else outcome

    def _store(self, store: Store, outcome: Outcome, bank: Bank, row: int) -> str:
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
        return store.add(voice, outcome.speaker, tenant=self.wanted.tenant)

    def _seconds(self, rows: Sequence[int]) -> float:
        return round(float(self.corpus.durations_N[list(rows)].sum()), 2)

    def _measure(
        self, bank: Bank, features: HeldFeatures, wave: Sequence[Speaker], rows: Mapping[str, int], part: str
    ) -> dict[str, Measured]:
        """Every speaker of the wave on a part of the speech, in mixed batches; without a row on the base."""
        utterances = [(s.name, i) for s in wave for i in getattr(s, part)]
        found = evaluate(
            self.variant.recogniser,
            self.corpus.subset([i for _, i in utterances]),
            features=Picked(features, [i for _, i in utterances]),
            owned=owned_by(self.variant, bank, [rows.get(name, 0) for name, _ in utterances]),
            progress=partial(self.watcher.progress, f"measuring on {part}"),
        )
        names = [name for name, _ in utterances]
        return {s.name: Measured.of(found, [k for k, name in enumerate(names) if name == s.name]) for s in wave}

    def _on_others(self, job: OwnerTraining, wave: Sequence[Speaker], rows: Mapping[str, int]) -> dict[str, float]:
        """How much larger each voice makes the loss on others' speech, relative to the base; none if there is none."""
        bank = job.bank
        listen = [i for k, i in enumerate(self.general) if k % _MEASURES == 0][:_OTHERS]
        groups = {}
        for speaker in wave:
            theirs = [s.choose[0] for s in wave if s.name != speaker.name][:_OTHERS]
            if heard := listen or theirs:
                groups[rows[speaker.name]] = heard
        after = job.nats_of(groups)
        stood = {row: bank.take(row) for row in groups}
        identity = bank.take(0)
        for row in groups:
            bank.put(row, identity)
        before = job.nats_of(groups)
        for row, tensors in stood.items():
            bank.put(row, tensors)
        return {name: after[row] / max(before[row], 1e-9) - 1 for name, row in rows.items() if row in groups}


def reasons_against(
    nats: tuple[float, float], errors: Sequence[Sequence[int]], others: float | None, worse: float
) -> list[str]:
    """Why a voice is not kept: nothing learned, more errors where it was chosen, or others' speech forgotten.

    Args: nats: per token on what chose, of the base and of the voice.  errors: there, of both.
    """
    found = []
    if nats[1] >= nats[0]:
        found.append("no better than the base on the utterances that choose")
    elif sum(errors[1]) > sum(errors[0]):
        found.append("more wrong words than the base on the utterances that choose")
    if others is not None and others > worse:
        found.append(f"the loss on speech of others grew by {others:.0%}, more than the {worse:.0%} allowed")
    return found


def _sizes_of(recogniser: Recogniser) -> tuple[Elastic, list[Size]]:
    assert recogniser.folder is not None, "loaded from a folder"
    sizes = read_sizes(recogniser.folder, recogniser)
    if len(sizes) < 2:
        raise UsageError(
            f"--sizes: {recogniser.folder} has no sizes to train across; leave it away, or take a supernet"
        )
    return Elastic(recogniser.model), sizes
