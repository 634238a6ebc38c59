"""A space of voices: trained on many speakers together, then a new speaker is a point in it, learned or predicted.

output/space.safetensors  what voices share, where speakers lie, the predictor      output/report.json  what came out

    S  speakers   M  examples of their speech   N  utterances, or pooled inputs   E  numbers of a voice   B  a batch
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from manyvoice.data.augment import Augment
from manyvoice.data.check import check
from manyvoice.data.collate import Collator, Features, HeldFeatures, Picked
from manyvoice.data.manifest import Corpus
from manyvoice.decode.evaluate import Evaluation, evaluate, group_of
from manyvoice.decode.recogniser import Recogniser
from manyvoice.decode.wer import resampled_sums
from manyvoice.errors import UsageError, WorkError
from manyvoice.recipes.speakers import Split, split_speakers, split_text
from manyvoice.recipes.variant import Variant, owned_by, owned_loss, whole_variant
from manyvoice.recipes.watch import Silent, Watcher
from manyvoice.submodels.bank import Bank
from manyvoice.submodels.generator import FILE, Generator, SpaceAdamW, generator_of, own_of
from manyvoice.submodels.method import make_method
from manyvoice.submodels.places import LocalPlace
from manyvoice.submodels.predict import EXAMPLES, Heard, Predictor, examples, fit_predictor, listen, taps_of
from manyvoice.submodels.voice import Voice
from manyvoice.train import distributed
from manyvoice.train.halfway import Halfway, digest_of, forget_all, halfway_of
from manyvoice.train.owners import Best, LossesOf, OwnerTraining, Schedule, Speech
from manyvoice.types import Batch

Floats = NDArray[np.float64]

REPORT = "report.json"
MASKS = Augment(freq_masks=2, time_masks=2)
# Below this all units may err to one side by luck more often than once in 32, and a bootstrap would call it certain.
FEWEST = 5
# The predictor is chosen by leaving speakers out; with fewer there is nothing to choose by.
_SPEAKERS = 4
_DRAWS = 10_000
# Of the variance; below it, and below zero, a prediction is worth no more than the mean.
_EXPLAINS = 0.05


@final
@dataclass(frozen=True, kw_only=True)
class SpaceTraining:
    """How a space is made.

    Args:
        method, settings: ``generated`` or ``mixture``.
        by: field of the manifest that tells speakers apart.
        split: of each speaker's utterances, which learn, choose when it is best, and report.
        masks: SpecAugment while learning.
    """

    method: str = "generated"
    settings: dict[str, Any] = field(default_factory=dict)
    by: str = "speaker"
    split: Split = Split(choose=0.1, test=0.1)
    schedule: Schedule = Schedule(lr=1e-2)
    masks: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check_rounds(self.schedule.rounds)


@final
@dataclass(frozen=True, kw_only=True)
class Learning:
    """How a speaker's own numbers are learned, all else frozen.

    Args:
        lr: in standard deviations of the training speakers, a round.
        prior: weight of their distribution around where a speaker starts.  1 would be Bayes' rule with nats as they
            are; 3 is the better of several by the choosing speakers of ``manyvoice bench space``.
    """

    rounds: int = 60
    utterances: int = 4
    lr: float = 0.1
    prior: float = 3.0
    masks: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check_rounds(self.rounds)


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise UsageError(f"rounds = {rounds}: must be 1 or more")


@final
@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much more nats one side takes, relative to the other, with the two-sided 95 % interval of a paired bootstrap.

    Args: units: utterances or speakers that were drawn.
    """

    relative: float
    interval: tuple[float, float]
    units: int

    @classmethod
    def of(cls, new_N: Sequence[float] | Floats, base_N: Sequence[float] | Floats) -> Difference:
        """From the nats of each unit on both sides."""
        both_N2 = np.stack([np.asarray(new_N, np.float64), np.asarray(base_N, np.float64)], axis=1)
        new, base = both_N2.sum(0)
        sums_M2 = resampled_sums(both_N2, _DRAWS, np.random.default_rng(0))
        low, high = np.quantile(sums_M2[:, 0] / np.maximum(sums_M2[:, 1], 1e-9) - 1, [0.025, 0.975])
        return cls(relative=float(new / max(base, 1e-9) - 1), interval=(float(low), float(high)), units=len(both_N2))

    @property
    def better(self) -> bool:
        """Whether it is below zero with its whole interval, of enough units."""
        return self.units >= FEWEST and self.interval[1] < 0

    def sentence(self, units: str = "utterances") -> str:
        """For people."""
        low, high = self.interval
        return f"{self.relative:+.1%} nats ({low:+.1%} to {high:+.1%} over {self.units} {units})"


@final
class Space:
    """A space on its base: predicts, learns and places speakers.

    Args: speakers: that it was made from, as far as is known.
    Raises: VoiceError if the space was not made for that base.
    """

    def __init__(self, variant: Variant, generator: Generator, speakers: Set[str] = frozenset()) -> None:
        self.speakers = speakers
        recogniser = variant.recogniser
        self.variant, self.model = variant, recogniser.model
        self.generator = generator.check(
            variant.anatomy, base=variant.base, tokenizer=recogniser.tokenizer.fingerprint()
        )
        _freeze(recogniser)

    @classmethod
    def load(cls, base: str | Path, space: Path) -> Space:
        """By the base's folder or hub id, and the space's file or folder."""
        made_of = space if space.is_dir() else space.parent
        # who a space has learned from is not in its file, which may travel without the report
        speakers = read_report(made_of).get("speakers", ()) if (made_of / REPORT).exists() else ()
        return cls(whole_variant(Recogniser.load(base)), Generator.read(space), frozenset(speakers))

    def bank(self, owners: Sequence[str]) -> Bank:
        """Rows at the mean of the training speakers."""
        recogniser = self.variant.recogniser
        return self.generator.bank(
            self.variant.anatomy, owners, dtype=self.model.dtype, device=str(recogniser.device)
        )  # fmt: skip

    def predict(self, features: Sequence[Tensor]) -> Floats:
        """A speaker's own numbers, E, from T F of some utterances. UsageError if the space has no predictor."""
        predictor = self.generator.predictor
        if predictor is None:
            raise UsageError("this space has no predictor; learn the voice from utterances with texts")
        return predictor(listen(self.model, features, predictor.taps))

    def starts(self, corpus: Corpus, features: Features, speech: Mapping[str, Sequence[int]]) -> dict[str, Floats]:
        """For whom learning had better begin at the predicted place than at the mean, and that place.

        Nothing of a prediction has seen the texts, so the utterances that a speaker learns from may decide.
        """
        if self.generator.predictor is None:
            return {}
        found = {}
        for name, rows in speech.items():
            bank = self.bank(["predicted", "mean"])
            place = self.predict([features.of(i, 0) for i in rows])
            self.generator.place(bank, 1, place)
            predicted, mean = (
                sum(self.evaluate(corpus, features, bank, rows, [row] * len(rows)).nats) for row in (1, 2)
            )
            if predicted < mean:
                found[name] = place
        return found

    def learn(
        self, corpus: Corpus, features: Features, speech: Mapping[str, Sequence[int]], wanted: Learning,
        progress: Callable[[int, int, int], None] | None = None, *, starts: Mapping[str, Floats] | None = None,
    ) -> Bank:  # fmt: skip
        """A bank with the own numbers of every speaker, learned by each alone on rows of the corpus.

        What is minimised is nats plus ``prior`` times half the squared distance to where the speaker starts, in the
        training speakers' covariance.

        Args: starts: own numbers E to start from, such as predicted ones; the training speakers' mean if not given.
        """
        tokenizer = self.variant.recogniser.tokenizer
        tokens = [tokenizer.encode(text) for text in corpus.texts()]
        total = {name: max(1, sum(len(tokens[i]) for i in rows)) for name, rows in speech.items()}
        bank = self.bank(list(speech))
        for row, name in enumerate(speech, start=1):
            if starts and name in starts:
                self.generator.place(bank, row, starts[name])
        start_SE = self.generator.standard(own_of(bank)).detach()
        row_of = {name: row for row, name in enumerate(speech)}

        def objective(bank: Bank, batch: Batch) -> Tensor:
            away_PE = self.generator.standard(own_of(bank)) - start_SE[[row_of[owner] for owner in bank.owners]]
            far_P = wanted.prior / 2 * away_PE.square().sum(1)
            of_P = torch.tensor([total[owner] for owner in bank.owners], dtype=far_P.dtype, device=far_P.device)
            # of every token of a speaker its share, so that a step on some utterances is a step of the whole
            return owned_loss(self.variant, bank, batch) + (far_P / of_P)[batch.owner_B - 1] * batch.token_len_B

        def losses(bank: Bank, batch: Batch, round: int) -> Iterator[Tensor]:
            yield objective(bank, batch)

        schedule = Schedule(rounds=wanted.rounds, utterances=wanted.utterances)
        augment = MASKS if wanted.masks else None
        collator = Collator(corpus, features, tokens, augment=augment, seed=wanted.seed)
        said = [Speech(adapt=tuple(rows), choose=tuple(rows)) for rows in speech.values()]
        job = OwnerTraining(bank, said, collator, losses, torch.no_grad()(objective), schedule, seed=wanted.seed)
        job.optimizer = SpaceAdamW(self.generator, bank, wanted.lr)
        job.run(progress)
        job.raise_if_all_lost()
        return bank

    def refine(
        self, corpus: Corpus, features: Features, voices: Mapping[str, Voice], speech: Sequence[Speech],
        schedule: Schedule, wanted: Learning, progress: Callable[[int, int, int], None] | None = None,
    ) -> tuple[Bank, list[Best]]:  # fmt: skip
        """A bank in which all weights of these voices, no longer of the space, have gone on to learn.

        Args: speech: of each, in order.  wanted: its masks and seed.
        Returns: the bank, and of each the best round by the utterances that choose, 0 if it stays as it was.
        """
        recogniser = self.variant.recogniser
        bank = Bank(self.variant.anatomy, next(iter(voices.values())).method, list(voices), empty=True,
                    dtype=recogniser.model.dtype, device=recogniser.device)  # fmt: skip
        for row, voice in enumerate(voices.values(), start=1):
            bank.put(row, voice.tensors)
        tokens = [recogniser.tokenizer.encode(text) for text in corpus.texts()]
        collator = Collator(corpus, features, tokens, augment=MASKS if wanted.masks else None, seed=wanted.seed)
        job = OwnerTraining(bank, speech, collator, *plain_losses(self.variant), schedule, seed=wanted.seed)
        best = job.run(progress)
        job.raise_if_all_lost()
        return bank, [best[row] for row in range(1, len(bank))]

    def evaluate(
        self, corpus: Corpus, features: Features, bank: Bank, rows: Sequence[int], owners: Sequence[int]
    ) -> Evaluation:
        """These rows of the corpus, each with a row of the bank; 0 is the base."""
        owned = owned_by(self.variant, bank, owners)
        return evaluate(
            self.variant.recogniser, corpus.subset(list(rows)), features=Picked(features, list(rows)), owned=owned
        )


def train_space(
    base: str | Path, corpus: Corpus, output: Path, wanted: SpaceTraining | None = None,
    watcher: Watcher | None = None,
) -> Path:  # fmt: skip
    """Train a space on all speakers of a manifest; returns its file. Stopped half way, the same call goes on.

    On the CPU. Under torchrun each process has its share of the speakers, and they learn what is shared together.

    Raises: UsageError for a method that shares nothing, fewer than 4 speakers with three utterances, or a folder that
        holds the space of other settings; CorpusError for a manifest with bad rows; WorkError if a speaker's loss is
        not finite, or no round was better than the base.
    """
    accelerator = distributed.start("fp32", cpu=True)
    main = accelerator.is_main_process
    job = _Making(base, corpus, wanted or SpaceTraining(), (watcher or Silent()) if main else Silent(), accelerator)
    # who said what is not in the fingerprint of a corpus where another field than speaker tells it
    made_of = digest_of(asdict(job.wanted), job.variant.base, corpus.fingerprint, split_text(corpus, job.speakers))
    if _made_already(output, made_of):
        distributed.stop_group()
        return output / FILE
    told = made_of, [s.name for s in job.mine], accelerator.num_processes
    halfway = Halfway(halfway_of(output, accelerator.process_index), digest_of(*told))
    generator, report = job.run(halfway)
    if main:
        # the report first: a space is finished once its file is there
        _write_report(output, {"hash": generator.hash, "made_of": made_of, **report})
        generator.write(output)
    accelerator.wait_for_everyone()
    if main:
        # a process of an earlier start may have left some too
        forget_all(output)
    distributed.stop_group()
    return output / FILE


def _write_report(output: Path, report: dict[str, Any]) -> None:
    text = json.dumps(report, ensure_ascii=False, indent=1, default=str) + "\n"
    try:
        LocalPlace(output).write(REPORT, text.encode())
    except OSError as error:
        raise WorkError(f"{output / REPORT}: cannot be written ({error}); make room and run it again") from error


def _made_already(output: Path, made_of: str) -> bool:
    """Whether this very space is finished here. UsageError if one of other settings, base or speakers is."""
    if not (output / FILE).exists():
        return False
    if (output / REPORT).exists() and read_report(output).get("made_of") == made_of:
        return True
    raise UsageError(
        f"{output / FILE} is a space of other settings, base or speech; choose another --output, or delete it"
    )


def worth_of_prediction(r2: float, speakers: str) -> str:
    """What a predictor's r2 means, in a sentence."""
    if r2 < _EXPLAINS:
        return (
            f"prediction explains nothing yet of how {speakers} differ: it is as good as guessing the average voice; "
            "train the space on more speakers"
        )
    return f"prediction explains {r2:.0%} of how {speakers} differ"


def read_report(output: Path) -> dict[str, Any]:
    """What :func:`train_space` wrote beside the space. WorkError if it cannot be read."""
    try:
        found: dict[str, Any] = json.loads((output / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkError(f"{output / REPORT}: cannot be read ({error}); train the space again") from error
    return found


@final
class _Making:
    """One training run's parts."""

    def __init__(
        self, base: str | Path, corpus: Corpus, wanted: SpaceTraining, watcher: Watcher, accelerator: Accelerator
    ) -> None:
        self.corpus, self.wanted, self.watcher, self.accelerator = corpus, wanted, watcher, accelerator
        recogniser = Recogniser.load(base)
        _freeze(recogniser)
        self.recogniser, self.variant = recogniser, whole_variant(recogniser)
        self.method = make_method(wanted.method, wanted.settings)
        if self.method.alone() == self.method:
            raise UsageError(f"method {wanted.method}: its voices share nothing, so they have no space; take generated")
        check(corpus, tokenizer=recogniser.tokenizer, encoder_frames=recogniser.encoder_frames).raise_if_bad()
        self.speakers, self.left_out = split_speakers(corpus, wanted.by, wanted.split)
        if nobodys := sum(group_of(u, wanted.by) is None for u in corpus):
            watcher.note(f"{nobodys} of {len(corpus)} utterances do not say their {wanted.by!r} and are left out")
        enough = max(_SPEAKERS, accelerator.num_processes)
        if len(self.speakers) < enough:
            raise UsageError(
                f"{len(self.speakers)} speakers with three utterances or more: a space wants {enough} at least, and "
                "some dozens to be of use; add speakers, or name the field that tells them apart with --by"
            )
        self.mine = self.speakers[accelerator.process_index :: accelerator.num_processes]
        self.tokens = [recogniser.tokenizer.encode(text) for text in corpus.texts()]

    def run(self, halfway: Halfway) -> tuple[Generator, dict[str, Any]]:
        """The space, the same on all processes, and its report."""
        rows = sorted({i for s in self.mine for i in s.rows()})
        said = partial(self.watcher.progress, "listening")
        features = HeldFeatures(self.corpus, self.recogniser.log_mel, rows, said)
        bank = Bank(self.variant.anatomy, self.method, [s.name for s in self.mine], seed=self.wanted.seed)
        best = self._train(bank, features, halfway)
        if all(one.round == 0 for one in best.values()):
            raise WorkError(
                f"nothing was learned in {self.wanted.schedule.rounds} rounds: the utterances that choose were never "
                "explained better than by the base; give more speech of each speaker, or other rates"
            )
        own_SE = self._gathered(own_of(bank).detach().double().cpu().numpy())
        self.watcher.note(f"fitting what predicts a voice from speech, on {len(own_SE)} speakers")
        predictor = self._predictor(features, own_SE)
        generator = generator_of(
            bank, own_SE, base=self.variant.base, tokenizer=self.recogniser.tokenizer.fingerprint(),
            predictor=predictor, card={"seconds": self._seconds(), "corpus": self.corpus.fingerprint},
        )  # fmt: skip
        history = [[r, float(np.mean([dict(b.history)[r] for b in best.values()]))] for r, _ in best[1].history]
        return generator, {
            "base": self.variant.base, "speakers": [s.name for s in self.speakers], "left_out": self.left_out,
            "settings": asdict(self.wanted), "numbers_per_voice": own_SE.shape[1], "spread": generator.spread,
            "choose_nats": history, "measured": self._measured(bank, features), "predictor": predictor.card(),
        }  # fmt: skip

    def _train(self, bank: Bank, features: HeldFeatures, halfway: Halfway) -> dict[int, Best]:
        augment = MASKS if self.wanted.masks else None
        collator = Collator(self.corpus, features, self.tokens, augment=augment, seed=self.wanted.seed)
        speech = [Speech(adapt=s.adapt, choose=s.choose) for s in self.mine]
        job = OwnerTraining(
            bank, speech, collator, *plain_losses(self.variant), self.wanted.schedule, seed=self.wanted.seed,
            accelerator=self.accelerator,
        )  # fmt: skip
        return job.run(lambda done, n, _: self.watcher.progress("training", done, n), halfway)

    def _predictor(self, features: HeldFeatures, own_SE: Floats) -> Predictor:
        found, taps = [], taps_of(self.recogniser.model)
        for speaker in self.mine:
            rows = (*speaker.adapt, *speaker.choose)
            heard = listen(self.recogniser.model, [features.of(i, 0) for i in rows], taps)
            seconds = [float(self.corpus.durations_N[i]) for i in rows]
            drawn = examples(heard, seconds, key=f"{self.wanted.seed} {speaker.name}")
            found.append(np.concatenate([Heard.pooled(parts) for parts in drawn]))
        pooled = self._gathered(np.stack(found)).reshape(len(self.speakers), EXAMPLES, -1)
        return fit_predictor(pooled, own_SE, taps)

    def _measured(self, bank: Bank, features: HeldFeatures) -> dict[str, Any]:
        """Speakers' utterances that report, on the base and with the voices they have here."""
        utterances = [(row, i) for row, s in enumerate(self.mine, start=1) for i in s.test]
        rows = [i for _, i in utterances]
        sides = []
        for owners in ([0] * len(rows), [row for row, _ in utterances]):
            found = evaluate(
                self.recogniser, self.corpus.subset(rows), features=Picked(features, rows),
                owned=owned_by(self.variant, bank, owners),
            )  # fmt: skip
            sides.append(
                speaker_sums(found, [s.name for s in self.mine], [self.mine[row - 1].name for row, _ in utterances])
            )
        base_SC, space_SC = self._gathered(sides[0]), self._gathered(sides[1])
        characters = float(base_SC[:, 2].sum())
        difference = Difference.of(space_SC[:, 0], base_SC[:, 0])
        return {
            "nats_per_character": [float(x[:, 0].sum()) / characters for x in (base_SC, space_SC)],
            "cer": [float(x[:, 1].sum()) / characters for x in (base_SC, space_SC)],
            "relative_nats": difference.relative, "interval_over_speakers": list(difference.interval),
        }  # fmt: skip

    def _seconds(self) -> float:
        return round(float(self.corpus.durations_N[[i for s in self.speakers for i in s.adapt]].sum()), 1)

    def _gathered(self, mine: Floats) -> Floats:
        """Rows of all speakers, in order, from each process's share."""
        first, step = self.accelerator.process_index, self.accelerator.num_processes
        everyone = torch.zeros(len(self.speakers), mine.shape[1], dtype=torch.float64)
        everyone[first::step] = torch.from_numpy(mine)
        return np.asarray(distributed.summed(self.accelerator, everyone).cpu().numpy(), dtype=np.float64)


def plain_losses(variant: Variant) -> tuple[LossesOf, Callable[[Bank, Batch], Tensor]]:
    """What owners minimise and what chooses, where both are the loss of the variant with their rows."""

    def losses(bank: Bank, batch: Batch, round: int) -> Iterator[Tensor]:
        yield owned_loss(variant, bank, batch)

    return losses, torch.no_grad()(partial(owned_loss, variant))


def speaker_sums(found: Evaluation, speakers: Sequence[str], names: Sequence[str]) -> Floats:
    """S 3: nats, character errors and characters of each speaker. names: of each utterance of the evaluation."""
    place = {name: k for k, name in enumerate(speakers)}
    sums_SC = np.zeros((len(speakers), 3))
    for name, nats, counts in zip(names, found.nats, found.characters.counts, strict=True):
        sums_SC[place[name]] += nats, counts.errors, counts.reference
    return sums_SC


def _freeze(recogniser: Recogniser) -> None:
    for p in recogniser.model.parameters():
        p.requires_grad_(False)
