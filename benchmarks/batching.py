"""What careless batches waste: a ladder of batchings under one memory limit, from durations and tokens alone.

    manyvoice bench batching            200,000 pairs with a long tail, and the corpora there are

random         batches of one fixed count, the largest that survives the worst batch of an epoch: "careless"
1-D            duration bins, each batch the same padded seconds, as many as the tightest bin holds
synchronised   the same batches; all ranks work on one bin at a time
2-D            each duration bin cut by tokens
2-D searched   every bin as many utterances as were measured to fit
neighbourhood  the same sizes; batches of neighbours around places drawn anew in each epoch

Memory is what training ``tiny`` was counted to take on this CPU. `bench batch_search` says how well that counts,
`bench batch_training` what the same batches do to training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from manyvoice.data.buckets import Bins, plane_bins, sizes_for
from manyvoice.data.manifest import open_corpus
from manyvoice.data.plan import Plan
from manyvoice.models.load import build_model
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.train.accounting import large_blocks_apart, resident
from manyvoice.train.distributed import start
from manyvoice.train.memory import Shape, Trial, fit_by_counting
from manyvoice.train.objective import ctc, one_pass
from manyvoice.train.optim import build_optimizer
from manyvoice.types import Seconds

LIMIT = 8 * 2**30
FRAMES, TOKENS, LARGER = 0.03, 0.10, 5.0
RANKS = 8
GRID = 30, 2
Batches = list[np.ndarray]


@dataclass(frozen=True)
class Pairs:
    """Durations and token counts of a corpus, its 2-D bins, what fits of each, and bytes of one utterance of each."""

    name: str
    d: np.ndarray
    u: np.ndarray
    bins: Bins
    sizes: tuple[int, ...]
    each: np.ndarray
    base: int

    def room(self, batch: np.ndarray) -> int:
        """Utterances of the batch's shape that fit."""
        return self.sizes[int(self.bins.assign(self.d[batch].max(keepdims=True), self.u[batch].max(keepdims=True))[0])]

    def gib(self, batch: np.ndarray) -> float:
        """What a batch takes."""
        cell = int(self.bins.assign(self.d[batch].max(keepdims=True), self.u[batch].max(keepdims=True))[0])
        return float(self.base + len(batch) * self.each[cell]) / 2**30


def run(bench: Bench) -> None:
    """The ladder on every corpus, and how long a plan of millions takes."""
    corpora = {"long-tailed pairs": long_tailed(4_000 if bench.toy else 200_000)} | on_disk(bench)
    limit = resident() + 2**29 if bench.toy else LIMIT
    for name, (d, u) in corpora.items():
        bench.watcher.note(f"{name}: {len(d)} utterances, {d.sum() / 3600:.1f} h")
        # a small corpus in much memory would be a handful of batches
        ladder(bench, measured(bench, name, (d, u), limit if len(d) > 100_000 else resident() + 2**29))
    planning(bench, 20_000 if bench.toy else 5_000_000)
    newest = bench.find(corpus="long-tailed pairs", batching="neighbourhood")[-1]
    plan = bench.find(kind="planning")[-1]
    why = "one row, on as many (duration, tokens) pairs as the row says"
    bench.aims = [
        Aim(name="padding of frames", sense="at most", limit=FRAMES, unit="of frames", measured=newest["frames_padded"],
            why=why),
        Aim(name="padding of tokens", sense="at most", limit=TOKENS, unit="of label columns",
            measured=newest["tokens_padded"], why=why),
        Aim(name="mean batch against careless at the same peak", sense="at least", limit=LARGER, unit="times",
            measured=newest["times_careless"], why=why),
        Aim(name="seconds until the first batch of a resumed run is known", sense="at most", limit=30.0,
            unit=f"s for {plan['utterances']} utterances", measured=plan["seconds"]),
    ]  # fmt: skip


def long_tailed(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal durations, median 4 s, within 0.5 and 40 s; log-normal tokens a second, median 3.5."""
    rng = np.random.default_rng(0)
    d = np.clip(rng.lognormal(np.log(4.0), 0.8, n), 0.5, 40.0)
    return d, np.maximum(1, np.ceil(d * np.exp(rng.normal(np.log(3.5), 0.35, n)))).astype(np.int64)


def on_disk(bench: Bench) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Corpora of ``MANYVOICE_DATA``; tokens are letters."""
    if bench.toy or not os.environ.get("MANYVOICE_DATA"):
        return {}
    found = {}
    for name in ("accented-english", "digits"):
        corpus = open_corpus(bench.data / name / "train.jsonl")
        found[name] = corpus.durations_N, np.asarray([len(t) for t in corpus.texts()], dtype=np.int64)
    return found


def measured(bench: Bench, name: str, pairs: tuple[np.ndarray, np.ndarray], limit: int) -> Pairs:
    """With what fits of each bin into the limit, as a run would find it."""
    d, u = pairs
    bins = plane_bins(d, u, *GRID)
    small = {"num_hidden_layers": 1, "hidden_size": 16} if bench.toy else {}
    model, _ = build_model("tiny", small, vocabulary=257, blank=256)
    trial = Trial(
        model, one_pass(ctc), lambda: build_optimizer(model.named_parameters(), "adamw", 4e-4, 0.01, (0.9, 0.98), 1e-8),
        start("fp32", cpu=True), bins=80,
    )  # fmt: skip
    shapes = [Shape(frames=round(100 * s), tokens=t) for s, t in bins.cells]
    large_blocks_apart()
    base = resident()
    found = fit_by_counting(trial, shapes, [len(d)] * len(bins), limit)
    each = (np.asarray(found.bytes_of) - base) / np.asarray(found.sizes)
    plan = Plan(corpus="", durations_N=d, tokens_N=u, bins=bins, sizes=tuple(found.sizes))
    return Pairs(name, d, u, bins, plan.rooms, each, base)


def ladder(bench: Bench, pairs: Pairs) -> None:
    """One row for each way to batch."""
    plan = Plan(corpus="", durations_N=pairs.d, tokens_N=pairs.u, bins=pairs.bins, sizes=pairs.sizes)
    # as much padded audio as fits in every bin: nobody has searched
    seconds = Seconds(min(n * s for n, (s, _) in zip(pairs.sizes, pairs.bins.cells, strict=True)))
    one_way = plane_bins(pairs.d, pairs.u, GRID[0])
    rungs: dict[str, Callable[[], Batches]] = {
        "random": lambda: careless(pairs),
        "1-D": lambda: flat(replace(plan, bins=one_way, sizes=sizes_for(one_way, seconds))),
        "synchronised": lambda: flat(replace(plan, bins=one_way, sizes=sizes_for(one_way, seconds), accumulate=RANKS)),
        "2-D": lambda: flat(replace(plan, sizes=sizes_for(pairs.bins, seconds))),
        "2-D searched": lambda: flat(replace(plan, accumulate=RANKS)),
        "neighbourhood": lambda: flat(replace(plan, layout="neighbourhood", accumulate=RANKS)),
    }
    rows = {name: summary(make(), pairs) for name, make in rungs.items()}
    base = rows["random"]
    for name, row in rows.items():
        speech = (1 - row["frames_padded"]) / (1 - base["frames_padded"])
        bench.row(
            seed=0,
            corpus=pairs.name,
            utterances=len(pairs.d),
            batching=name,
            **{k: round(v, 4) for k, v in row.items()},
            times_careless=round(row["mean_seconds"] / base["mean_seconds"], 3),
            gain_padding=round(speech, 3),
            gain_size=round(row["mean_seconds"] / base["mean_seconds"] / speech, 3),
            # no padding at all in batches that hold as many padded seconds as the longest utterances allow
            bound_times_careless=round(float(pairs.d.max() / pairs.d.mean()), 2),
        )


def careless(pairs: Pairs) -> Batches:
    """Random batches of the largest fixed count of which the worst batch of the epoch fits."""
    order = np.random.default_rng(0).permutation(len(pairs.d))

    def cut(n: int) -> Batches:
        return [order[i : i + n] for i in range(0, len(order), n)]

    low, high = 1, max(pairs.sizes)
    while low < high:
        middle = (low + high + 1) // 2
        fits = all(len(b) <= pairs.room(b) for b in cut(middle))
        low, high = (middle, high) if fits else (low, middle - 1)
    return cut(low)


def flat(plan: Plan) -> Batches:
    """Micro-batches of an epoch in order."""
    return [micro for step in plan.epoch(0) for micro in step]


def summary(batches: Batches, pairs: Pairs) -> dict[str, float]:
    """Padding on each batch's own maxima, size, updates, memory, and how long ranks wait for the slowest."""
    d, u = pairs.d, pairs.u
    cost = np.asarray([len(b) * d[b].max() for b in batches])
    whole = cost[: len(cost) // RANKS * RANKS].reshape(-1, RANKS)
    return {
        "frames_padded": 1 - float(d.sum()) / float(cost.sum()),
        "tokens_padded": 1 - float(u.sum()) / float(sum(len(b) * u[b].max() for b in batches)),
        "mean_seconds": float(d.sum()) / len(batches),
        "updates_per_epoch": float(len(batches)),
        "peak_gib": max(pairs.gib(b) for b in batches),
        f"busy_on_{RANKS}_ranks": float(whole.mean() / whole.max(1).mean()) if len(whole) else 1.0,
    }


def planning(bench: Bench, n: int) -> None:
    """How long it takes a process that has nothing but what is written down to know the batches still to come."""
    d, u = long_tailed(n)
    bins = plane_bins(d, u, *GRID)
    for layout in ("bins", "neighbourhood"):
        plan = Plan(
            corpus="", durations_N=d, tokens_N=u, bins=bins, sizes=sizes_for(bins, Seconds(1000.0)), layout=layout
        )  # fmt: skip
        started = time.perf_counter()
        steps = plan.epoch(3)
        seconds = time.perf_counter() - started
        bench.row(seed=0, kind="planning", layout=layout, utterances=n, steps=len(steps), seconds=round(seconds, 2))
