"""Sentences by 190 Mandarin speakers of English, half of them children: what 2.3 hours give, and what synthesis adds.

    manyvoice bench sentences arms=real epochs=40
    manyvoice bench sentences arms=synthetic,both epochs=6
    manyvoice bench sentences arms=both-characters epochs=2 seconds=30
    manyvoice bench sentences arms=real-characters from=both-characters epochs=12 seconds=30
                                                   goes on from the arm before, on the real speech alone
    manyvoice bench sentences report=real-characters-from-both-characters
                                                   the one look at the reporting speakers, by the chosen arm

An arm is a corpus and, after a dash, its units: ``real``, ``both-characters``, ``synthetic-sp128``.
Of the 125 training speakers of the accented corpus 25, drawn by seed 0, choose; the 65 speakers of its dev part report,
once, children (under 16) and adults apart. Synthetic speech: 60 voices in eight dialects speak everyday phrases and
phrases of novels, half of them with noise, half in a room.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from manyvoice.config import make_run
from manyvoice.data.manifest import open_corpus
from manyvoice.data.synth import SynthSpec, synthesise
from manyvoice.decode.evaluate import Evaluation, evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.errors import UsageError
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.recipes.train import train

SEED = 0
CHOOSING_SPEAKERS = 25
ADULT = 16
SYNTHETIC_UTTERANCES = 33_000  # a little over 20 hours
VOICES = 60


def run(bench: Bench) -> None:
    """Train the arms asked for and choose on 25 speakers; with ``report=ARM`` measure that arm on the others."""
    real, choosing = real_parts(bench)
    arms = [a for a in bench.option("arms", "").split(",") if a]
    for arm in arms:
        train_arm(bench, arm, bench.option("from", ""), real, choosing)
    if arm := bench.option("report", ""):
        report(bench, arm)
    reported = [r for r in bench.rows if r.get("kind") == "report"]
    hours = [r["synthetic_hours"] for r in bench.rows if r.get("synthetic_hours")]
    bench.aims = [
        Aim(
            name="hours of synthetic speech added to the real ones",
            sense="at least", limit=20.0, unit="hours", measured=max(hours, default=None),
        ),
        Aim(
            name="reporting speakers looked at: arms reported",
            sense="at least", limit=1, unit="reports", measured=float(len(reported)),
            why="the error rates are findings, not aims: they stand in the rows",
        ),
    ]  # fmt: skip


def real_parts(bench: Bench) -> tuple[Path, Path]:
    """Manifests of the 100 speakers that train and the 25 that choose."""
    folder = bench.work / "real"
    paths = folder / "train.jsonl", folder / "choose.jsonl"
    if not all(p.exists() for p in paths):
        rows = open_corpus(bench.data / "accented-english" / "train.jsonl")
        if bench.toy:
            rows = rows.subset(range(0, len(rows), 25))
        share = CHOOSING_SPEAKERS / 125
        parts = rows.split(by="speaker", shares={"train": 1 - share, "choose": share}, seed=SEED)
        folder.mkdir(parents=True, exist_ok=True)
        for path, name in zip(paths, ("train", "choose"), strict=True):
            parts[name].write(path, overwrite=True)
    return paths


def synthetic(bench: Bench) -> Path:
    """Manifest of the synthetic speech, spoken if it is not there."""
    folder = bench.work / "synthetic"
    manifest = folder / "manifest.jsonl"
    if manifest.exists():
        return manifest
    phrases = bench.work / "phrases.txt"
    texts = [bench.data / "text" / name for name in ("everyday.txt", "novels.txt")]
    lines = [line.strip() for path in texts for line in path.read_text(encoding="utf-8").splitlines()]
    phrases.write_text("\n".join(dict.fromkeys(lines)) + "\n", encoding="utf-8")
    spec = SynthSpec(
        utterances=40 if bench.toy else SYNTHETIC_UTTERANCES,
        speakers=4 if bench.toy else VOICES,
        grammar="sentences",
        text=phrases,
        words=(4, 12),
        noise=0.5,
        room=0.5,
        snr_db=(5, 25),
        seed=SEED,
    )
    return synthesise(
        spec,
        folder,
        jobs=int(bench.option("jobs", "2")),
        progress=lambda d, n: bench.watcher.progress("speaking", d, n),
    )


def train_arm(bench: Bench, arm: str, origin: str, real: Path, choosing: Path) -> None:
    """One row: the arm's best checkpoint on the choosing speakers, begun from nothing or from another arm's."""
    data, _, units = arm.partition("-")
    manifests = [str(real)] if data in ("real", "both") else []
    spoken = synthetic(bench) if data in ("synthetic", "both") else None
    manifests += [str(spoken)] if spoken else []
    epochs = 1 if bench.toy else int(bench.option("epochs", "40"))
    settings: dict[str, Any] = {"subsampling_factor": 4 if units == "characters" else 8}
    tokenizer = {"kind": "characters"} if units == "characters" else {"size": int(units[2:] or 256) if units else 256}
    if bench.toy:
        settings |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        tokenizer = {"kind": "characters"}
    model: dict[str, Any] = {"settings": settings}
    if origin:
        # the voices of a synthesiser have left their mark on the norms' statistics too
        model = {"base": str(bench.work / chosen(bench, origin)["model"]), "freeze_batchnorm": False}
        arm = f"{arm}-from-{origin}"
    output = bench.work / "runs" / f"{arm}-{epochs}"
    config = make_run(
        {
            "output": str(output),
            "seed": SEED,
            "corpus": {"train": manifests, "dev": str(choosing), "skip_bad": True, "licence": "Apache-2.0"},
            "tokenizer": tokenizer,
            "model": model,
            "augment": {"freq_masks": 2, "freq_width": 15, "time_masks": 2, "time_share": 0.05},
            "batch": {"seconds": float(bench.option("seconds", "80")), "bins": 10, "layout": "bins"},
            "optimizer": {"lr": float(bench.option("lr", "4e-4" if origin else "0.02"))},
            "train": {"epochs": epochs, "threads": int(bench.option("threads", "1"))},
        }
    )
    started = time.perf_counter()
    model = train(config, watcher=bench.watcher, command=f"manyvoice bench sentences arms={arm} epochs={epochs}")
    found = evaluate(Recogniser.load(model), open_corpus(choosing))
    hours = float(open_corpus(spoken).durations_N.sum()) / 3600 if spoken else 0.0
    bench.row(
        seed=SEED, kind="choose", arm=arm, epochs=epochs, lr=config.optimizer.lr,
        optimizer=config.optimizer_name, synthetic_hours=round(hours, 2),
        minutes=round((time.perf_counter() - started) / 60, 1), model=str(model.relative_to(bench.work)),
        **_rates(found),
    )  # fmt: skip


def report(bench: Bench, arm: str) -> None:
    """One row: the chosen model on the reporting speakers, children and adults apart."""
    best = chosen(bench, arm)
    corpus = open_corpus(bench.data / "accented-english" / "dev.jsonl")
    if bench.toy:
        corpus = corpus.subset(range(0, len(corpus), 50))
    found = evaluate(Recogniser.load(bench.work / best["model"]), corpus)
    ages = ["child" if int(str(u.extra["age"])) < ADULT else "adult" for u in corpus]
    groups = {
        f"{unit}_{g.group}": g.counts.rate
        for unit, score in (("wer", found.words), ("cer", found.characters))
        for g in score.by_group(ages)
    }
    bench.row(seed=SEED, kind="report", arm=arm, epochs=best["epochs"], **_rates(found), **groups)


def chosen(bench: Bench, arm: str) -> dict[str, Any]:
    """The arm's row with the fewest wrong words of the choosing speakers."""
    rows = [r for r in bench.rows if r.get("kind") == "choose" and r["arm"] == arm]
    if not rows:
        raise UsageError(f"no row of the arm {arm}: run `manyvoice bench sentences arms={arm}` first")
    return min(rows, key=lambda r: float(r["wer"]))


def _rates(found: Evaluation) -> dict[str, Any]:
    return {
        "wer": found.words.rate,
        "wer_interval": list(found.words.interval(by="speaker")),
        "cer": found.characters.rate,
        "loss_per_character": found.loss_per_character,
    }
