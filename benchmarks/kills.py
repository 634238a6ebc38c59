"""A run on real digits, killed fifty times at random moments and started again: is it the run that never stopped?

    manyvoice bench kills

Each of the fifty is a run of its own, killed by SIGKILL after a random share of an unkilled run's time, or in a random
phase of writing a checkpoint, then started again by the same settings until it ends. Losses (every field of the log
that the clock does not touch) and the bytes of the model must be those of the unkilled run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from manyvoice.config import RunConfig, make_run
from manyvoice.data.join import join_clips
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.recipes.train import train
from manyvoice.train.checkpoint import Keeper
from manyvoice.train.metrics import TIMINGS, read_metrics

SEED = 0
# a checkpoint passes this many phases: files written, synced, moved, older ones deleted
PHASES = 11


def run(bench: Bench) -> None:
    """One row for all the kills of this call."""
    kills = 3 if bench.toy else int(bench.option("kills", "50"))
    speech = bench.work / "speech"
    if not speech.exists():
        join_clips(bench.data / "digits" / "train.jsonl", speech, strings=60, clips=(1, 3), seed=SEED)
    whole = bench.work / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    started = time.perf_counter()
    train(_config(speech, whole))
    took = time.perf_counter() - started
    rng = random.Random(SEED)
    same, killed, in_writing, number = 0, 0, 0, 0
    while killed < kills:
        number += 1
        folder = bench.work / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        # every second one dies while a checkpoint is written
        phase = rng.randint(1, 4 * PHASES) if number % 2 else 0
        delay = rng.uniform(0.0, took)
        if not _killed(_config(speech, folder), phase, delay):
            continue  # it had ended before: no kill, so it does not count
        killed += 1
        in_writing += phase > 0
        train(_config(speech, folder))
        same += _outcome(folder) == _outcome(whole)
        bench.watcher.progress("killed and resumed", killed, kills)
    bench.row(seed=SEED, kills=killed, killed_writing_a_checkpoint=in_writing, identical=same)
    last = bench.rows[-1]
    bench.aims = [
        Aim(
            name="killed at a random moment and resumed: runs with losses and weights bit-identical",
            sense="equal", limit=float(last["kills"]), unit="runs", measured=float(last["identical"]),
        ),
    ]  # fmt: skip


def _config(speech: Path, output: Path) -> RunConfig:
    """About thirty steps with dropout, SpecAugment, two micro-batches a step, and a checkpoint every third step."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "subsampling_conv_channels": 8}
    return make_run(
        {
            "output": str(output),
            "seed": SEED,
            "corpus": {"train": str(speech / "manifest.jsonl")},
            "tokenizer": {"kind": "words"},
            "model": {"settings": {**small, "dropout": 0.1, "activation_dropout": 0.1}},
            "batch": {"seconds": 5, "bins": 3, "accumulate": 2},
            "train": {"epochs": 3, "checkpoint_every": 3, "average": 2, "threads": 1},
        }
    )


def _killed(config: RunConfig, phase: int, delay: float) -> bool:
    """Train in a forked process that dies in a phase of writing, or after ``delay`` seconds; whether it did."""
    child = os.fork()
    if child == 0:
        try:
            if phase:
                _die_in_phase(phase)
            else:
                timer = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()
            train(config)
        finally:
            sys.stdout.flush()
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def _die_in_phase(number: int) -> None:
    plain, seen = Keeper.save, [0]

    def tell(phase: str) -> None:
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def save(*args: Any, **options: Any) -> Any:
        return plain(*args, **options, on_phase=tell)

    Keeper.save = save  # type: ignore[method-assign]


def _outcome(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    lines = [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(folder)]
    return lines, (folder / "model" / "model.safetensors").read_bytes()
