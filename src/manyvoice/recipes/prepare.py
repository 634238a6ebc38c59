"""From a run file to what is trained: corpora opened and checked, a recogniser built or loaded, batches planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import final

import numpy as np

from manyvoice.config import AugmentConfig, CorpusConfig, RunConfig
from manyvoice.data.augment import Augment
from manyvoice.data.buckets import Bins
from manyvoice.data.check import Report, check
from manyvoice.data.collate import CachedFeatures, Collator, Features, LiveFeatures, decoded, read_ahead
from manyvoice.data.features import LogMel
from manyvoice.data.manifest import Corpus, open_corpus
from manyvoice.data.plan import Plan, share
from manyvoice.data.tokens import train_tokenizer
from manyvoice.data.utterance import FileAudio
from manyvoice.decode.recogniser import Recogniser
from manyvoice.errors import CorpusError
from manyvoice.models.anatomy import parameter_count
from manyvoice.models.load import build_model
from manyvoice.recipes import batching
from manyvoice.recipes.ready import check_sizes
from manyvoice.recipes.watch import Watcher
from manyvoice.types import Batch

# a recogniser, bins and how many utterances each has, to how many of each fit and how that is known
MeasureFor = Callable[[Recogniser, Bins, Sequence[int]], tuple[tuple[int, ...], str]]
# With fewer speakers a share of them would be none, or nearly all the speech.
SPEAKERS_TO_SPLIT_BY = 10


@final
@dataclass(frozen=True)
class Corpora:
    """Speakers of ``dev`` and ``test`` are whatever their manifests say; only a split made here keeps them apart."""

    train: Corpus
    dev: Corpus
    test: Corpus | None


@final
@dataclass(frozen=True)
class Prepared:
    """What a training run works with."""

    corpora: Corpora
    recogniser: Recogniser
    plan: Plan
    collator: Collator
    dev_features: Features


def open_corpora(config: CorpusConfig, seed: int, watcher: Watcher) -> Corpora:
    """Open and check train, dev and test; where there is no dev, keep a share of the training speakers for it.

    Raises: CorpusError listing bad rows, unless ``skip_bad`` leaves them out.
    """

    def opened(spec: str | list[str], name: str) -> Corpus:
        corpus = open_corpus(spec)
        report = check(corpus, progress=lambda done, total: watcher.progress(f"checking {name}", done, total))
        return _sound_rows(corpus, report, config.skip_bad, watcher, name)

    train = opened(config.train, "train")
    test = opened(config.test, "test") if config.test else None
    if config.dev:
        return Corpora(train, opened(config.dev, "dev"), test)
    by = "utterance"
    if len(train.speakers()) >= SPEAKERS_TO_SPLIT_BY and all(u.speaker is not None for u in train):
        by = "speaker"
    else:
        watcher.note(
            f"dev: {config.dev_share:.0%} of train by utterance, so the same people may be on both sides; rows of "
            f"{SPEAKERS_TO_SPLIT_BY} speakers or more, all with a speaker, are split by speaker"
        )
    parts = train.split(by=by, shares={"train": 1.0 - config.dev_share, "dev": config.dev_share}, seed=seed)
    if not len(parts["train"]) or not len(parts["dev"]):
        raise CorpusError(
            f"corpus.dev_share = {config.dev_share} of {len(train)} utterances leaves nothing on one side; "
            "give a corpus.dev, or more speech"
        )
    return Corpora(parts["train"], parts["dev"], test)


def _sound_rows(corpus: Corpus, report: Report, skip_bad: bool, watcher: Watcher, name: str) -> Corpus:
    """The corpus, or what is left of it where bad rows may be skipped; problems are told either way."""
    if report.problems:
        watcher.note(f"{name}: {report.text(limit=5)}")
    if not skip_bad:
        report.raise_if_bad()
        return corpus
    return report.keep(corpus)


def build_recogniser(run: RunConfig, corpus: Corpus) -> Recogniser:
    """Random weights and a tokenizer learned from the corpus, or the base that the run names, or of both a part."""
    base = Recogniser.load(run.model.base) if run.model.base is not None else None
    if base is not None and not run.model.new_vocabulary:
        return base
    tokenizer = train_tokenizer(
        corpus.texts(), run.tokenizer.kind, size=run.tokenizer.size, normalise=run.tokenizer.normalise
    )
    if base is not None:
        renewed = base.family.renewed(base.model, vocabulary=len(tokenizer), blank=tokenizer.blank)
        return Recogniser(renewed, base.family, tokenizer, base.log_mel)
    preset = run.model.preset or "tiny"
    model, family = build_model(preset, run.model.settings, vocabulary=len(tokenizer), blank=tokenizer.blank)
    return Recogniser(model, family, tokenizer, LogMel.build(family.features(model)))


def trainable(corpus: Corpus, recogniser: Recogniser, skip_bad: bool, watcher: Watcher) -> Corpus:
    """The training rows, whose labels must exist and fit into the encoder's frames.

    Only training needs that: a text that the model cannot write is an error it makes, and is measured.
    """
    report = check(
        corpus,
        tokenizer=recogniser.tokenizer,
        encoder_frames=recogniser.encoder_frames,
        audio=False,
        progress=lambda done, total: watcher.progress("checking labels", done, total),
    )
    return _sound_rows(corpus, report, skip_bad, watcher, "train")


def augment_of(config: AugmentConfig) -> Augment:
    """The same settings where the data layer reads them."""
    settings = config.model_dump()
    settings["speed"] = tuple(settings["speed"])
    return Augment(**settings)


def features_of(
    corpus: Corpus, log_mel: LogMel, cache: Path | None, watcher: Watcher, name: str, augment: Augment, seed: int
) -> Features:
    """Cached features where there is a place for them; cached samples where augmentation changes the audio.

    Args: cache: the folder of the features; samples lie beside it, in one that ends in ``-audio``.
    """
    if cache is None:
        return LiveFeatures(corpus, log_mel, augment, seed)
    if augment.changes_audio:
        samples = decoded(
            corpus,
            log_mel.rate,
            cache.with_name(f"{cache.name}-audio"),
            lambda done, total: watcher.progress(f"decoding {name}", done, total),
        )
        return LiveFeatures(corpus, log_mel, augment, seed, samples)
    return CachedFeatures.build(
        corpus, log_mel, cache, lambda done, total: watcher.progress(f"features of {name}", done, total)
    )


def _cache_of(run: RunConfig, corpus: Corpus, log_mel: LogMel, name: str) -> Path | None:
    """Where a corpus's cache lies: by its name in the run's folder, by what is in it in a folder that runs share."""
    cache = run.corpus.cache
    if isinstance(cache, bool):
        return Path(run.output) / "cache" / name if cache else None
    return Path(cache) / sha256(CachedFeatures.key(corpus, log_mel).encode()).hexdigest()[:16]


def prepare(
    run: RunConfig,
    watcher: Watcher,
    *,
    recogniser: Recogniser | None = None,
    measure: MeasureFor,
    accept: Callable[[Plan], None] = lambda plan: None,
    keep: bool = True,
) -> Prepared:
    """Open, check, build, plan and cache.

    Args: recogniser: what a resumed run was trained with.  measure: how many utterances of a shape fit into memory.
        accept: raises if a resumed run had another plan; asked before any features are computed.
        keep: write the plan, and manifests of a split that is made here.
    """
    corpora = open_corpora(run.corpus, run.seed, watcher)
    if run.corpus.dev is None and keep:
        _keep_split(Path(run.output), corpora)
    recogniser = recogniser or build_recogniser(run, corpora.train)
    check_sizes(recogniser.model, run)
    train = trainable(corpora.train, recogniser, run.corpus.skip_bad, watcher)
    dev = corpora.dev
    train, tokens, plan, sizes = plan_batches(run, train, recogniser, measure, watcher)
    accept(plan)
    if keep and sizes is not None:
        batching.write_plan(Path(run.output) / "plan.json", plan, sizes)
    augment = augment_of(run.augment)
    train_cache, dev_cache = (
        _cache_of(run, corpus, recogniser.log_mel, name) for corpus, name in ((train, "train"), (dev, "dev"))
    )
    features = features_of(train, recogniser.log_mel, train_cache, watcher, "train", augment, run.seed)
    dev_features = features_of(dev, recogniser.log_mel, dev_cache, watcher, "dev", Augment(), run.seed)
    collator = Collator(train, features, tokens, augment=augment, seed=run.seed)
    return Prepared(Corpora(train, dev, corpora.test), recogniser, plan, collator, dev_features)


def plan_batches(
    run: RunConfig, train: Corpus, recogniser: Recogniser, measure: MeasureFor, watcher: Watcher
) -> tuple[Corpus, list[list[int]], Plan, batching.Sizes | None]:
    """Rows to train on, their labels, and the plan; sizes are None where the run's folder already holds them."""
    tokens = [recogniser.tokenizer.encode(text) for text in train.texts()]
    tokens_N = np.asarray([len(t) for t in tokens], dtype=np.int64)
    augment = augment_of(run.augment)
    begun = batching.read_plan(Path(run.output) / "plan.json", train)
    bins = begun[0] if begun else batching.bins_of(run.batch, train.durations_N, tokens_N, augment.speed)
    if run.batch.strict:
        kept = batching.keep_strict(bins, train, tokens_N, skip_bad=run.corpus.skip_bad)
        if len(kept) < len(train):
            watcher.note(f"batch.strict: {len(train) - len(kept)} of {len(train)} utterances left out")
        train, tokens, tokens_N = train.subset(kept), [tokens[i] for i in kept], tokens_N[kept]
        begun = begun or batching.read_plan(Path(run.output) / "plan.json", train)
        bins = begun[0] if begun else bins
    if begun is not None:
        return train, tokens, batching.make_plan(run, train, tokens_N, bins, begun[1], augment), None
    counts = np.bincount(bins.assign(train.durations_N, tokens_N), minlength=len(bins)).tolist()
    # neighbours of one shape may come from several bins
    most = counts if run.batch.layout == "bins" else [len(train)] * len(bins)

    def plan_with(used: Sequence[int]) -> Plan:
        return batching.make_plan(run, train, tokens_N, bins, used, augment)

    sizes = batching.sizes_of(
        run.batch, bins, counts, lambda b: measure(recogniser, b, most), lambda used: plan_with(used).steps(0)
    )
    watcher.note(f"batches: {sizes.source}")
    return train, tokens, plan_with(sizes.used), sizes


def _keep_split(folder: Path, corpora: Corpora) -> None:
    """Manifests of a split made here, so that the card's claims about it can be checked later."""
    for name, corpus in (("train", corpora.train), ("dev", corpora.dev)):
        # rows whose sound is no file of its own, as a Hugging Face dataset's, cannot be listed
        if all(isinstance(u.audio, FileAudio) for u in corpus):
            corpus.write(folder / f"{name}.jsonl", overwrite=True)


def feed(
    prepared: Prepared, epoch: int, start: int, *, rank: int = 0, ranks: int = 1, workers: int = 0
) -> Iterator[list[Batch]]:
    """Steps of an epoch from ``start`` on, as this rank's micro-batches; of a ragged last step it may have none."""
    plan = prepared.plan
    shares = [share(step, rank, ranks) for step in plan.epoch(epoch)[start:]]
    flat = [indices for step in shares for indices in step]
    batches = read_ahead(prepared.collator, flat, epoch, workers)
    for step in shares:
        yield [replace(next(batches), cell=plan.cell_of(indices, epoch)) for indices in step]


def unaugmented(prepared: Prepared) -> Prepared:
    """The same training batches of sound and features as they are."""
    now = prepared.collator
    features = now.features
    if isinstance(features, LiveFeatures):
        features = LiveFeatures(now.corpus, prepared.recogniser.log_mel, audio=features.audio)
    return replace(prepared, collator=Collator(now.corpus, features, now.tokens))


def dry_run(run: RunConfig, watcher: Watcher, measure: MeasureFor) -> dict[str, object]:
    """What a run would do: corpora opened and checked, the plan's figures; nothing is written or trained."""
    corpora = open_corpora(run.corpus, run.seed, watcher)
    recogniser = build_recogniser(run, corpora.train)
    check_sizes(recogniser.model, run)
    train = trainable(corpora.train, recogniser, run.corpus.skip_bad, watcher)
    train, _, plan, sizes = plan_batches(run, train, recogniser, measure, watcher)
    return {
        "output": run.output,
        "hours": round(float(train.durations_N.sum()) / 3600, 3),
        "utterances": len(train),
        "speakers": len(train.speakers()),
        "dev_utterances": len(corpora.dev),
        "vocabulary": len(recogniser.tokenizer),
        "parameters": parameter_count(recogniser.model),
        "batches": sizes.source if sizes else "as in the run's folder",
        "steps_per_epoch": plan.steps(0),
        "steps": plan.steps(0) * run.train.epochs,
    }
