"""How a run's batches come about: bins from the corpus, sizes from memory, and both written down for every resume.

``plan.json`` in the run's folder holds bins and sizes. A run that is resumed reads them there, on whatever machine:
its steps stay what they were, and a machine with less memory cuts them smaller.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import numpy as np

from manyvoice.config import BatchConfig, RunConfig
from manyvoice.data.augment import Augment, speed_factor
from manyvoice.data.buckets import NOWHERE, Bins, plane_bins, seconds_for_updates, sizes_for
from manyvoice.data.manifest import Corpus
from manyvoice.data.plan import Plan
from manyvoice.errors import CheckpointError, CorpusError
from manyvoice.types import Seconds

# Utterances a duration bin should have, and the most bins: Canary's profiles have 30. Few utterances in many bins
# would make many a ragged last batch.
_UTTERANCES_PER_BIN = 320
_MOST_BINS, _FEWEST_BINS = 30, 4


@final
@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Utterances in a batch of each bin, and where they come from.

    Args:
        fit: how many memory holds; None where it was not measured.
        updates_seconds: padded audio of a batch that ``batch.updates`` allows; None where it does not bind.
        source: in words.
    """

    used: tuple[int, ...]
    fit: tuple[int, ...] | None
    updates_seconds: float | None
    source: str


# bins, to how many utterances of each fit and how that is known
Measure = Callable[[Bins], tuple[tuple[int, ...], str]]


def tempo_of(corpus: Corpus, augment: Augment, seed: int) -> Callable[[int], np.ndarray] | None:
    """Speed factors of all utterances in an epoch; None where augmentation has none."""
    if not augment.speed:
        return None
    ids = [u.id for u in corpus]

    @lru_cache(maxsize=2)
    def tempo(epoch: int) -> np.ndarray:
        return np.asarray([speed_factor(augment, seed=seed, epoch=epoch, utterance=i) for i in ids])

    return tempo


def bins_of(config: BatchConfig, durations_N: np.ndarray, tokens_N: np.ndarray, speeds: Sequence[float]) -> Bins:
    """Cells that every utterance fits into at any of the speeds it may be played at."""
    number = config.bins or min(_MOST_BINS, max(_FEWEST_BINS, len(durations_N) // _UTTERANCES_PER_BIN))
    factors = [1.0 / s for s in speeds] or [1.0]
    durations = np.concatenate([durations_N * f for f in factors])
    return plane_bins(durations, np.tile(tokens_N, len(factors)), number, config.token_bins)


def keep_strict(bins: Bins, corpus: Corpus, tokens_N: np.ndarray, *, skip_bad: bool) -> np.ndarray:
    """Rows that have room in the bins of their own duration. CorpusError names the others unless they may go."""
    rejected = np.flatnonzero(bins.assign(corpus.durations_N, tokens_N, strict=True) == NOWHERE)
    if len(rejected) and not skip_bad:
        named = "; ".join(
            f"{corpus[int(i)].id}: {int(tokens_N[i])} tokens in {corpus[int(i)].duration:.2f} s" for i in rejected[:5]
        )
        raise CorpusError(
            f"batch.strict: {len(rejected)} utterances have more tokens than the bins of their duration hold "
            f"({named}); set batch.strict=false to batch them with longer ones, or corpus.skip_bad=true to leave them "
            "out"
        )
    return np.setdiff1d(np.arange(len(corpus)), rejected)


def sizes_of(
    config: BatchConfig,
    bins: Bins,
    counts: Sequence[int],
    measure: Measure,
    steps: Callable[[tuple[int, ...]], int],
) -> Sizes:
    """As many as fit, or as ``batch.seconds`` says, but so that an epoch has its updates, or batches their least size.

    Args: steps: that an epoch has with such sizes.
    """
    if config.seconds is not None:
        return Sizes(
            used=sizes_for(bins, Seconds(config.seconds)),
            fit=None,
            updates_seconds=None,
            source=f"batch.seconds = {config.seconds:g}",
        )
    fit, how = measure(bins)
    cap: float | None = None
    used = fit
    if config.updates:
        cap = seconds_for_updates(bins, counts, config.updates, accumulate=config.accumulate) or bins.edges[0]
        cap = max(cap, config.least)
        used = _at_most(fit, bins, cap)
        # neighbours fill their batches better than bins do, so there may be fewer of them
        while (found := steps(used)) < config.updates and max(used) > 1 and cap > config.least:
            cap = max(config.least, cap * min(0.99, found / config.updates))
            used = _at_most(fit, bins, cap)
    binds = cap is not None and used != fit
    why = f"{config.updates} updates an epoch leave" if cap != config.least else "batch.updates goes no lower than"
    source = how + (f"; {why} {cap:.1f} s a batch" if binds else "")
    return Sizes(used=used, fit=fit, updates_seconds=cap if binds else None, source=source)


def _at_most(fit: tuple[int, ...], bins: Bins, seconds: float) -> tuple[int, ...]:
    return tuple(min(a, b) for a, b in zip(fit, sizes_for(bins, Seconds(seconds)), strict=True))


def make_plan(
    run: RunConfig, corpus: Corpus, tokens_N: np.ndarray, bins: Bins, sizes: Sequence[int], augment: Augment
) -> Plan:
    """The plan of a run from its bins and sizes."""
    return Plan(
        corpus=corpus.fingerprint,
        durations_N=corpus.durations_N,
        tokens_N=tokens_N,
        bins=bins,
        sizes=tuple(sizes),
        accumulate=run.batch.accumulate,
        seed=run.seed,
        layout=run.batch.layout,
        tempo=tempo_of(corpus, augment, run.seed),
    )


def write_plan(path: Path, plan: Plan, sizes: Sizes) -> None:
    """``plan.json``: what a resume needs, and what a reader wants to know."""
    cells = plan.cells(0)
    counts = np.bincount(cells, minlength=len(plan.bins)).tolist()
    rows = [
        {"seconds": s, "tokens": t, "utterances": n, "size": size}
        | ({} if sizes.fit is None else {"fits": sizes.fit[i]})
        for i, ((s, t), n, size) in enumerate(zip(plan.bins.cells, counts, plan.sizes, strict=True))
    ]
    document = {
        "corpus": plan.corpus,
        "source": sizes.source,
        "updates_seconds": sizes.updates_seconds,
        "steps_per_epoch": plan.steps(0),
        "bins": rows,
    }
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def read_plan(path: Path, corpus: Corpus) -> tuple[Bins, tuple[int, ...]] | None:
    """Bins and sizes of a run that has begun; None where it has not, or was begun with other rows.

    Raises: CheckpointError for a file that is not what :func:`write_plan` writes.
    """
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["corpus"] != corpus.fingerprint:
            return None
        bins = Bins(tuple((float(row["seconds"]), int(row["tokens"])) for row in found["bins"]))
        return bins, tuple(int(row["size"]) for row in found["bins"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is damaged ({error!r}); put it back as it was, or start afresh in another output folder"
        ) from error
