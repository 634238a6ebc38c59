"""What lets a model that knows nothing leave the plateau on which CTC training begins.

    manyvoice bench start                     one epoch of real digit strings, subsampling 4 and 8, 12 minutes
    manyvoice bench start factors=8 seed=1

*draws*: random weights of linear layers and convolutions as torch draws them, which new models have, or as Transformers
does, with a standard deviation of 0.02 for all. *flat start*: ``train.flat_start``, on by default, or off. All arms see
the same strings in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ParakeetForCTC

from manyvoice.config import make_run
from manyvoice.data.join import join_clips
from manyvoice.data.manifest import open_corpus
from manyvoice.decode.evaluate import evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.recipes.prepare import build_recogniser
from manyvoice.recipes.train import train
from manyvoice.train.metrics import read_metrics

LAST = 20  # steps whose loss is told


def run(bench: Bench) -> None:
    """Train what is not there yet."""
    seed = int(bench.option("seed", "0"))
    for factor in map(int, bench.option("factors", "4,8").split(",")):
        for draws in ("torch", "0.02"):
            for flat in (True, False):
                if not bench.find(seed=seed, factor=factor, draws=draws, flat_start=flat):
                    arm(bench, seed, factor, draws, flat)
    aims(bench)


def arm(bench: Bench, seed: int, factor: int, draws: str, flat: bool) -> None:
    """One row."""
    output = bench.work / "runs" / f"{factor}-{draws}-{'flat' if flat else 'plain'}-{seed}"
    settings: dict[str, Any] = {"subsampling_factor": factor}
    if bench.toy:
        settings |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "subsampling_conv_channels": 8}
    spoken = strings(bench)
    made: dict[str, Any] = {
        "output": str(output), "seed": seed, "corpus": {"train": str(spoken["train"]), "licence": "CC-BY-SA-4.0"},
        "tokenizer": {"kind": "words", "size": 100}, "model": {"settings": settings},
        "batch": {"seconds": 40, "bins": 6}, "train": {"epochs": 1, "threads": 1, "flat_start": flat},
    }  # fmt: skip
    if draws == "0.02":
        start = output.with_name(f"{output.name}-start")
        torch.manual_seed(seed)
        ours = build_recogniser(make_run(made), open_corpus(spoken["train"]))
        ours.model.load_state_dict(ParakeetForCTC(ours.model.config).state_dict())
        ours.save(start)
        made["model"] = {"base": str(start), "freeze_batchnorm": False}
    model = train(make_run(made), watcher=bench.watcher, command="manyvoice bench start")
    losses = [line["loss"] for line in read_metrics(output) if "loss" in line]
    found = evaluate(Recogniser.load(model), open_corpus(spoken["test"]))
    bench.row(
        seed=seed, factor=factor, draws=draws, flat_start=flat, steps=len(losses),
        nats_a_word=round(float(np.mean(losses[-LAST:])), 4), wer=found.words.rate,
        wer_interval=list(found.words.interval()),
    )  # fmt: skip


def strings(bench: Bench) -> dict[str, Path]:
    """Manifests of joined clips, to train on and to report."""
    paths = {}
    for seed, (part, count) in enumerate({"train": 40 if bench.toy else 4000, "test": 8 if bench.toy else 500}.items()):
        paths[part] = bench.work / part / "manifest.jsonl"
        if not paths[part].exists():
            clips = open_corpus(bench.data / "digits" / f"{part}.jsonl")
            join_clips(clips, paths[part].parent, strings=count, clips=(1, 6), seed=seed)
    return paths


def aims(bench: Bench) -> None:
    """What new models do is to be the best of the four."""
    bench.aims = []
    for factor in sorted({r["factor"] for r in bench.rows}):
        rows = [r for r in bench.find(factor=factor) if r["seed"] == bench.find(factor=factor)[-1]["seed"]]
        wer = {(r["draws"], r["flat_start"]): r["wer"] for r in rows}
        if len(wer) == 4:
            mine = wer.pop(("torch", True))
            told = ", ".join(f"{d}{' and flat' if f else ''} {w:.1%}" for (d, f), w in wer.items())
            bench.aims.append(
                Aim(name=f"subsampling {factor}: WER after one epoch, over the best of the other ways to start",
                    sense="at most", limit=1.0, unit="times", measured=round(mine / max(min(wer.values()), 1e-9), 3),
                    why=f"{mine:.1%} against {told}")
            )  # fmt: skip
