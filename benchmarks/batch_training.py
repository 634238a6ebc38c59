"""What careless batches cost in real training: the same model, data, updates and memory; only batches differ.

    manyvoice bench batch_training seeds=0,1,2      three arms, each seed, from one model that is past its plateau
    manyvoice bench batch_training start=nothing    three arms from random weights: see below
    manyvoice bench batch_training part=ranks       1 -> 2 -> 1 processes in mid-epoch: what was trained on

Real digits joined to strings of 1 to 24 clips with a long tail. *careless*: random utterances, the largest count of
which the worst batch fits into the memory. *bins* and *neighbourhood*: sizes measured for the same memory, limited to
as many updates an epoch as careless makes, so that the arms differ in padding and not in how often weights move. Peak
memory is the process's own. Every arm has BatchNorm without padding; its batch statistics do depend on which
utterances share a batch. On clean strings all arms end near zero, so accuracy is compared on strings in noise.

When a run from random weights leaves the plateau where it says nothing is chance, and larger than what batches do to
accuracy. So all arms start from one model, trained on the short strings alone, in batches of its own, until its dev
WER was below 50 %.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from zlib import crc32

import matplotlib
import numpy as np
import soundfile

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from manyvoice.config import make_run
from manyvoice.data.augment import Augment, augment_audio
from manyvoice.data.buckets import plane_bins
from manyvoice.data.join import join_clips
from manyvoice.data.manifest import open_corpus
from manyvoice.data.padding import PaddingMeter
from manyvoice.decode.compare import Arm, compare
from manyvoice.decode.evaluate import evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.decode.wer import Score
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.recipes.prepare import build_recogniser
from manyvoice.recipes.sizing import Sizer
from manyvoice.recipes.watch import Silent
from manyvoice.train.checkpoint import load
from manyvoice.train.distributed import start
from manyvoice.train.metrics import read_metrics

ARMS = ("careless", "neighbourhood", "bins")
# clips of a string and how many strings: most are short, a few are long, as in every corpus of found speech
LENGTHS = (((1, 3), 1500), ((4, 8), 400), ((10, 16), 90), ((18, 24), 30))
MODEL = {
    "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384,
    "subsampling_factor": 4, "subsampling_conv_channels": 16,
}  # fmt: skip
SNR = 0.0, 10.0
KINDS = {"warm": "training", "nothing": "training from nothing"}
# dev WER below which a model has left the plateau
PAST = 0.5
CAREFUL, TWICE, HALF = "neighbourhood", 2.0, 0.5


def run(bench: Bench) -> None:
    """Train what is not yet there, then compare."""
    if bench.option("part", "") == "ranks":
        ranks(bench)
    else:
        for seed in map(int, bench.option("seeds", "0").split(",")):
            for arm in ARMS:
                one(bench, arm, seed, bench.option("start", "warm"))
                if bench.option("start", "warm") == "warm":
                    accuracy(bench, arm, seed)
    aims(bench)


def noisy(bench: Bench) -> Path:
    """Test strings in noise of 0 to 10 dB, where error rates are far enough from zero to be compared."""
    folder = bench.work / "speech" / "noisy"
    made = folder / "manifest.jsonl"
    if made.exists():
        return made
    clean = folder / "clean"
    join_clips(bench.data / "digits" / "test.jsonl", clean, strings=24 if bench.toy else 2000, clips=(1, 8), seed=11)
    settings = Augment(noise=1.0, snr_db=SNR)
    rows = []
    for u in open_corpus(clean / "manifest.jsonl"):
        samples = augment_audio(u.audio.read(16_000), settings, seed=0, epoch=0, utterance=u.id)
        soundfile.write(folder / f"{u.id}.flac", samples.clip(-1, 1), 16_000)
        told = {"id": u.id, "audio_filepath": f"{u.id}.flac", "duration": u.duration, "text": u.text}
        rows.append(json.dumps(told | {"speaker": u.speaker}))
    made.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return made


def corpora(bench: Bench) -> tuple[list[Path], Path]:
    """Training manifests, one for each range of lengths, and the test's."""
    digits = bench.data / "digits"
    share = 40 if bench.toy else 1
    parts = []
    for k, (clips, strings) in enumerate(LENGTHS):
        folder = bench.work / "speech" / f"train-{k}"
        made = folder / "manifest.jsonl"
        rows = open_corpus(digits / "train.jsonl")
        parts.append(
            made if made.exists() else join_clips(rows, folder, strings=max(2, strings // share), clips=clips, seed=k)
        )
    test = bench.work / "speech" / "test" / "manifest.jsonl"
    if not test.exists():
        join_clips(digits / "test.jsonl", test.parent, strings=24 if bench.toy else 600, clips=(1, 8), seed=9)
    return parts, test


def settings(bench: Bench, seed: int, output: Path, batch: dict[str, Any], base: Path | None = None) -> dict[str, Any]:
    """The run file of all arms but for ``batch``."""
    parts, _ = corpora(bench)
    shape = MODEL | ({"num_hidden_layers": 1, "hidden_size": 16} if bench.toy else {})
    return {
        "output": str(output),
        "seed": seed,
        "corpus": {"train": [str(p) for p in parts], "dev_share": 0.05, "licence": "CC-BY-SA-4.0"},
        "tokenizer": {"kind": "words", "size": 100},
        "model": {"settings": shape} if base is None else {"base": str(base), "freeze_batchnorm": False},
        "augment": {"freq_masks": 0, "time_masks": 0},
        "batch": {"memory": memory(bench), **batch},
        "optimizer": {"name": "adamw", "lr": 6e-4, "warmup": 0.2},
        "train": {"epochs": 1 if bench.toy else int(bench.option("epochs", "5")), "threads": 1},
    }


def warm(bench: Bench) -> Path:
    """The model that all arms start from."""
    output = bench.work / "runs" / "warm"
    folder = output / "past-the-plateau"
    if not folder.exists():
        made = settings(bench, 0, output, {"seconds": 14})
        made["corpus"]["train"] = made["corpus"]["train"][:1]
        epochs = 1 if bench.toy else 24
        made["train"] |= {"epochs": epochs, "keep_last": epochs}
        path = bench.work / "warm.yaml"
        path.write_text(json.dumps(made), encoding="utf-8")
        manyvoice("train", path)
        measured = [line for line in read_metrics(output) if "dev_wer" in line]  # each has a checkpoint
        past = [line for line in measured if line["dev_wer"] < PAST or bench.toy]
        recogniser = Recogniser.load(output / "start")
        recogniser.model.load_state_dict(load(output / "checkpoints" / f"step-{past[0]['step']:08d}").tensors["model"])
        recogniser.save(folder)
    return folder


def memory(bench: Bench) -> str:
    """That all arms may take."""
    return bench.option("memory", "1GiB")


def careless_count(bench: Bench) -> int:
    """The largest number of utterances such that as many of the longest fit."""
    config = make_run(settings(bench, 0, bench.work / "none", {}))
    train = open_corpus(list(config.corpus.train) if isinstance(config.corpus.train, list) else config.corpus.train)
    recogniser = build_recogniser(config, train)
    tokens = [len(recogniser.tokenizer.encode(t)) for t in train.texts()]
    bins = plane_bins(train.durations_N, np.asarray(tokens), 1)
    sizes, _ = Sizer(config, start("fp32"), Silent())(recogniser, bins, [len(train)])
    return sizes[-1]


def one(bench: Bench, arm: str, seed: int, start_from: str) -> None:
    """One row: an arm trained in a process of its own."""
    kind = KINDS[start_from]
    if bench.find(arm=arm, seed=seed, kind=kind):
        return
    base = warm(bench) if start_from == "warm" else None
    parts, test = corpora(bench)
    rows = open_corpus([str(p) for p in parts])
    count = careless_count(bench)
    updates = math.ceil(len(rows) * 0.95 / count)
    longest = float(rows.durations_N.max())
    batch: dict[str, Any] = {"layout": arm, "updates": updates}
    if arm == "careless":
        batch = {"layout": "bins", "bins": 1, "token_bins": 1, "seconds": count * longest * 1.0001}
    output = bench.work / "runs" / f"{start_from}-{arm}-{seed}"
    path = bench.work / f"{start_from}-{arm}-{seed}.yaml"
    path.write_text(json.dumps(settings(bench, seed, output, batch, base)), encoding="utf-8")
    started = time.perf_counter()
    manyvoice("train", path)
    minutes = (time.perf_counter() - started) / 60
    lines = read_metrics(output)
    waste = PaddingMeter(lines).total()
    found = evaluate(Recogniser.load(output / "model"), open_corpus(test))
    bench.row(
        seed=seed, kind=kind, arm=arm, wer=found.words.rate, errors=errors_of(found.words),
        words=[c.reference for c in found.words.counts],
        frames_padded=round(waste.frame_padding, 4), tokens_padded=round(waste.token_padding, 4),
        mean_seconds=round(waste.audio_seconds / waste.steps, 2), step_seconds=round(waste.seconds / waste.steps, 4),
        audio_per_second=round(waste.audio_seconds / waste.seconds, 2), train_seconds=round(waste.seconds, 1),
        updates_per_epoch=round(waste.steps / max(1, round(lines[-1]["epoch"]))),
        minutes=round(minutes, 2), peak_mib=round(lines[-1]["memory_mib"]), careless_count=count, curve=curve(lines),
    )  # fmt: skip


def accuracy(bench: Bench, arm: str, seed: int) -> None:
    """One row: a trained arm on the strings in noise."""
    if bench.find(arm=arm, seed=seed, kind="accuracy in noise"):
        return
    found = evaluate(Recogniser.load(bench.work / "runs" / f"warm-{arm}-{seed}" / "model"), open_corpus(noisy(bench)))
    bench.row(
        seed=seed, kind="accuracy in noise", arm=arm, wer=found.words.rate, wer_interval=list(found.words.interval()),
        errors=errors_of(found.words), words=[c.reference for c in found.words.counts], snr_db=SNR,
    )  # fmt: skip


def errors_of(score: Score) -> list[int]:
    """Errors of each utterance."""
    return [c.errors for c in score.counts]


def curve(lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(seconds of training so far, dev WER) whenever it was measured."""
    spent, found = 0.0, []
    for line in lines:
        spent += line["seconds"]
        if "dev_wer" in line:
            found.append((round(spent, 1), line["dev_wer"]))
    return found


def manyvoice(*words: object, processes: int = 1, until: Path | None = None, step: int = 0) -> None:
    """The command in processes of its own; with ``until``, stopped by SIGTERM once that run has made ``step`` steps."""
    script = "from manyvoice.cli import main; main()"
    command = [sys.executable, "-c", script]
    if processes > 1:
        launcher = Path(__file__).parents[1] / "tests" / "recipes" / "launch.py"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            str(launcher),
        ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([*command, *map(str, words)], env=environment, stderr=subprocess.PIPE, text=True,
                          stdout=subprocess.DEVNULL, start_new_session=True) as child:  # fmt: skip
        stopped = False
        while until is not None and child.poll() is None and not stopped:
            if len(read_metrics(until)) >= step:
                os.killpg(child.pid, signal.SIGTERM)
                stopped = True
            time.sleep(0.1)
        told = child.communicate()[1]
    if child.returncode and not stopped:
        raise RuntimeError(told[-2000:])


def ranks(bench: Bench) -> None:
    """One row: a run on 1, then 2, then 1 processes, stopped in mid-epoch, against the corpus, by sums of its ids."""
    output = bench.work / "runs" / "ranks"
    made = settings(bench, 0, output, {"updates": 40, "accumulate": 2})
    made["train"] = {"epochs": 2, "threads": 1, "checkpoint_every": 3}
    path = bench.work / "ranks.yaml"
    path.write_text(json.dumps(made), encoding="utf-8")
    manyvoice("train", path, until=output, step=5)
    manyvoice("train", path, processes=2, until=output, step=16)
    manyvoice("train", path)
    lines = read_metrics(output)
    document = json.loads((output / "plan.json").read_text(encoding="utf-8"))
    rows = open_corpus(output / "train.jsonl")
    expected = sum(crc32(u.id.encode()) for u in rows)
    steps = document["steps_per_epoch"]
    sums = [sum(line["ids"] for line in lines if epoch < line["epoch"] <= epoch + 1) for epoch in range(2)]
    seen = [sum(line["utterances"] for line in lines if epoch < line["epoch"] <= epoch + 1) for epoch in range(2)]
    bench.row(
        seed=0, kind="ranks", processes=[1, 2, 1], utterances=len(rows), seen=seen, steps=[len(lines), 2 * steps],
        multiset_exact=bool(all(s == expected for s in sums) and all(n == len(rows) for n in seen)),
    )  # fmt: skip


def aims(bench: Bench) -> None:
    """From the rows of all seeds."""
    rows = bench.find(kind="training")
    by_arm = {arm: [r for r in rows if r["arm"] == arm] for arm in ARMS}
    seeds = min(len(found) for found in by_arm.values())
    exact = bench.find(kind="ranks")
    bench.aims = [
        Aim(name="ranks 1 -> 2 -> 1 in mid-epoch: every utterance once", sense="equal", limit=1, unit="exact multisets",
            measured=float(exact[-1]["multiset_exact"]) if exact else None)
    ]  # fmt: skip
    if not seeds:
        return
    mean = {arm: [sum(r[k] for r in found) / len(found) for k in ("audio_per_second", "train_seconds")]
            for arm, found in by_arm.items()}  # fmt: skip
    rule = {}
    heard = {arm: sorted(bench.find(kind="accuracy in noise", arm=arm), key=lambda r: r["seed"]) for arm in ARMS}
    seeds = min(len(found) for found in heard.values())
    if not seeds:
        return
    words = heard["careless"][0]["words"]
    for arm in ARMS[1:]:
        new, base = (
            Arm(name=a, errors=[r["errors"] for r in heard[a][:seeds]], reference_words=words)
            for a in (arm, "careless")
        )
        rule[arm] = compare(new, base, synthetic=False)
        bench.watcher.note(rule[arm].sentence())
    # runs were not measured in noise on the way, so reaching the other's error rate takes the whole run at most
    spent = {arm: {r["seed"]: r["train_seconds"] for r in by_arm[arm]} for arm in (CAREFUL, "careless")}
    finals = list(zip(heard[CAREFUL], heard["careless"], strict=False))
    reached = all(ours["wer"] <= theirs["wer"] for ours, theirs in finals)
    shares = [spent[CAREFUL][ours["seed"]] / spent["careless"][ours["seed"]] for ours, _ in finals]
    told = "; ".join(f"{ours['wer']:.1%} against {theirs['wer']:.1%} in noise" for ours, theirs in finals)
    bench.aims += [
        Aim(name="throughput against careless in the same memory", sense="at least", limit=TWICE, unit="times",
            measured=round(mean[CAREFUL][0] / mean["careless"][0], 3)),
        Aim(name="time to careless's final WER, every seed", sense="at most", limit=HALF, unit="of careless's time",
            measured=round(max(shares), 3) if reached else None, why=told),
        Aim(name="accuracy in noise not inferior at equal updates", sense="equal", limit=1, unit="verdicts that hold",
            measured=float(rule[CAREFUL].holds), interval=rule[CAREFUL].interval, why=rule[CAREFUL].sentence()),
        Aim(name="neighbourhoods not inferior to bins", sense="at most", limit=0.05, unit="relative WER",
            measured=round(compare(
                *(Arm(name=a, errors=[r["errors"] for r in heard[a][:seeds]], reference_words=words)
                  for a in ("neighbourhood", "bins")), synthetic=False).upper, 4),
            why="the one-sided bound of the comparison"),
    ]  # fmt: skip
    if not bench.toy:
        draw(by_arm, bench.path.parent / "batch_training.png")


def draw(by_arm: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """WER on dev against seconds of training, every seed a line."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for colour, (arm, rows) in zip(("tab:red", "tab:blue", "tab:green"), by_arm.items(), strict=True):
        for k, row in enumerate(rows):
            seconds, wer = zip(*row["curve"], strict=True)
            axes.plot(seconds, [100 * w for w in wer], color=colour, marker=".", label=None if k else arm, alpha=0.8)
    axes.set(xlabel="seconds of training, one thread", ylabel="dev WER, %", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
