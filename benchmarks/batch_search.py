"""Are the batch sizes found by counting those that really fit? Real steps at real sizes, each in a process of its own.

    manyvoice bench batch_search       four cells of a long-tailed corpus at 2 GiB, then an epoch at the sizes found

*fits*: three real steps of that many utterances in a new process, whose resident memory stays within the limit. The
size found is tried, and one that is 5 % larger or by one utterance; where the search was further off, the largest that
fits is bisected to 2 %. *epoch*: every batch of an epoch in one process, as training runs them: its peak
against the limit, and how many batches went over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from manyvoice.data.buckets import plane_bins
from manyvoice.data.plan import Plan
from manyvoice.models.load import build_model
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.train.accounting import Leftovers, large_blocks_apart, resident_peak
from manyvoice.train.distributed import start
from manyvoice.train.memory import Shape, Trial, bracket, fit_by_counting
from manyvoice.train.objective import ctc, one_pass
from manyvoice.train.optim import build_optimizer
from manyvoice.train.profile import parse_bytes

GRID = 8, 2
WITHIN = 0.05


def run(bench: Bench) -> None:
    """Search, then try."""
    if bench.option("part", "") == "aims":
        aims(bench)
        return
    settings = {"num_hidden_layers": 1, "hidden_size": 16} if bench.toy else {}
    utterances = 60 if bench.toy else 3000
    asked = {"settings": settings, "limit": bench.option("memory", "700MiB" if bench.toy else "2GiB"), "n": utterances}
    found = child({"work": "search", **asked})
    limit = parse_bytes(asked["limit"])
    cells = found["cells"]
    count = min(len(cells), 1 if bench.toy else int(bench.option("cells", "4")))
    chosen = [round((k + 1) * len(cells) / count) - 1 for k in range(count)]
    for k in chosen:
        frames, tokens = cells[k]
        size = found["sizes"][k]

        def fits(n: int, frames: int = frames, tokens: int = tokens) -> bool:
            return bool(
                child({"work": "step", **asked, "frames": frames, "tokens": tokens, "size": n})["peak"] <= limit
            )

        above = max(size + 1, int(size * (1 + WITHIN)) + 1)
        if fits(size) and not fits(above):
            most = above - 1  # no larger is known not to fit
        else:
            most = bracket(fits, size, 2 * size, tolerance=0.6 if bench.toy else 0.02)
        peak = child({"work": "step", **asked, "frames": frames, "tokens": tokens, "size": size})["peak"]
        bench.row(
            seed=0, kind="cell", frames=frames, tokens=tokens, found=size, fits=most,
            found_of_fits=round(size / most, 4), peak_of_limit=round(peak / limit, 4), limit=asked["limit"],
            search_seconds=found["seconds"], confirmed=found["confirmed"],
        )  # fmt: skip
    epoch = child({"work": "epoch", **asked, "sizes": found["sizes"]})
    bench.row(
        seed=0, kind="epoch", limit=asked["limit"], batches=epoch["batches"], over=epoch["over"],
        peak_of_limit=round(epoch["peak"] / limit, 4), median_of_limit=round(epoch["median"] / limit, 4),
    )  # fmt: skip
    aims(bench)


def aims(bench: Bench) -> None:
    """From the newest row of each cell, and the newest epoch."""
    rows = list({(r["limit"], r["frames"], r["tokens"]): r for r in bench.find(kind="cell")}.values())
    epochs = bench.find(kind="epoch")
    bench.aims = [
        Aim(name="sizes found against what really fits: the one furthest off", sense="at most", limit=WITHIN,
            unit="relative", measured=max((abs(1 - r["found_of_fits"]) for r in rows), default=None),
            why="on a CPU; " + ", ".join(f"{r['found']} of {r['fits']}" for r in rows)),
        Aim(name="batches of an epoch that went over the limit", sense="equal", limit=0, unit="batches",
            measured=float(epochs[-1]["over"]) if epochs else None,
            why=f"of {epochs[-1]['batches']}" if epochs else "not run yet"),
    ]  # fmt: skip


def child(asked: dict[str, Any]) -> Any:
    """What a process of its own answers."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), json.dumps(asked)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def long_tailed(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal durations, median 4 s, within 0.5 and 20 s; log-normal tokens a second, median 3.5."""
    rng = np.random.default_rng(0)
    d = np.clip(rng.lognormal(np.log(4.0), 0.8, n), 0.5, 20.0)
    return d, np.maximum(1, np.ceil(d * np.exp(rng.normal(np.log(3.5), 0.35, n)))).astype(np.int64)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """In the child: ``tiny`` or a toy, and what was asked."""
    large_blocks_apart()
    model, _ = build_model("tiny", asked["settings"], vocabulary=257, blank=256)
    trial = Trial(
        model, one_pass(ctc), lambda: build_optimizer(model.named_parameters(), "adamw", 4e-4, 0.01, (0.9, 0.98), 1e-8),
        start("fp32", cpu=True), bins=80,
    )  # fmt: skip
    limit = parse_bytes(asked["limit"])
    d, u = long_tailed(asked["n"])
    bins = plane_bins(d, u, *GRID)
    shapes = [Shape(frames=round(100 * s), tokens=t) for s, t in bins.cells]
    if asked["work"] == "search":
        started = time.perf_counter()
        found = fit_by_counting(trial, shapes, [10**6] * len(shapes), limit)
        seconds = round(time.perf_counter() - started, 1)
        cells = [(s.frames, s.tokens) for s in shapes]
        return {"sizes": found.sizes, "cells": cells, "confirmed": found.confirmed, "seconds": seconds}
    trial.run(shapes[0], 1)
    if asked["work"] == "step":
        shape = Shape(frames=asked["frames"], tokens=asked["tokens"])
        return {"peak": max(peak(trial, shape, asked["size"]) for _ in range(3))}
    plan = Plan(corpus="", durations_N=d, tokens_N=u, bins=bins, sizes=tuple(asked["sizes"]), layout="neighbourhood")
    peaks, tidy = [], Leftovers(limit)
    for batch in (micro for step in plan.epoch(0) for micro in step):
        shape = Shape(frames=round(100 * d[batch].max()), tokens=int(u[batch].max()))
        peaks.append(peak(trial, shape, len(batch)))
        tidy()  # as the training loop does
    return {"peak": max(peaks), "median": float(np.median(peaks)), "batches": len(peaks),
            "over": sum(p > limit for p in peaks)}  # fmt: skip


def peak(trial: Trial, shape: Shape, size: int) -> int:
    """Bytes of the process at most while a step runs."""
    found = resident_peak(lambda: trial.run(shape, size))
    if found is None:
        raise SystemExit("this system does not tell the memory of a process")
    return found


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
