"""Connected digits from four real speakers: a tiny model from nothing, and speakers it has never heard.

    manyvoice bench digits                 seen speakers, the main aim
    manyvoice bench digits arms=leave-out  the same with each speaker left out of training in turn

Strings are clips of one speaker joined; the test joins four clips of the published test part 240 times by seed 0.
The interval resamples the test *clips*: strings share clips, so strings are not independent.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from manyvoice.config import make_run
from manyvoice.data.join import join_clips
from manyvoice.data.manifest import Corpus, open_corpus
from manyvoice.decode.evaluate import evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.decode.wer import Score, alignment
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.recipes.train import train

SEED = 0
LIMIT = 0.05
MINUTES = 10.0


def run(bench: Bench) -> None:
    """Train and measure the arms asked for, then state the aims from the newest row of each."""
    arms = bench.option("arms", "seen")
    speakers = open_corpus(bench.data / "digits" / "train.jsonl").speakers()
    if "seen" in arms:
        _arm(bench, None)
    if "leave-out" in arms:
        for speaker in speakers:
            _arm(bench, speaker)
    seen = bench.find(arm="seen")
    last = seen[-1] if seen else None
    bench.aims = [
        Aim(
            name="digit strings, seen speakers: WER on 240 strings of four clips",
            sense="below", limit=LIMIT, unit="WER",
            measured=last["wer"] if last else None, interval=tuple(last["interval"]) if last else None,
        ),
        Aim(
            name="digit strings: training time on two cores",
            sense="below", limit=MINUTES, unit="minutes", measured=last["minutes"] if last else None,
        ),
    ]  # fmt: skip


def _arm(bench: Bench, left_out: str | None) -> None:
    """Train without one speaker, test on that speaker; or train on all and test on all."""
    name = "seen" if left_out is None else f"without {left_out}"
    folder = bench.work / name.replace(" ", "-")
    digits = bench.data / "digits"
    train_clips, test_clips = open_corpus(digits / "train.jsonl"), open_corpus(digits / "test.jsonl")
    if left_out is not None:
        train_clips = train_clips.where(lambda u: u.speaker != left_out)
        test_clips = test_clips.where(lambda u: u.speaker == left_out)
    strings, tests, epochs = (40, 24, 1) if bench.toy else (4000, 240, int(bench.option("epochs", "4")))
    spoken = _joined(train_clips, folder / "train", strings, (1, 6), seed=1)
    test = _joined(test_clips, folder / "test", tests, 4, seed=SEED)
    config = make_run(
        {
            "output": str(folder / "run"),
            "seed": SEED,
            "corpus": {"train": str(spoken), "dev_share": 0.04, "licence": "CC-BY-SA-4.0"},
            "tokenizer": {"kind": "words", "size": 100},
            "batch": {"seconds": 40, "bins": 6},
            "train": {"epochs": epochs, "threads": int(bench.option("threads", "1"))},
        }
    )
    started = time.perf_counter()
    model = train(config, watcher=bench.watcher, command=f"manyvoice bench digits ({name})")
    minutes = (time.perf_counter() - started) / 60
    found = evaluate(Recogniser.load(model), open_corpus(test))
    clips = [json.loads(line)["clips"] for line in test.read_text(encoding="utf-8").splitlines()]
    bench.row(
        seed=SEED,
        arm=name,
        wer=found.words.rate,
        interval=list(clip_interval(found.words, clips)),
        words=found.words.total.reference,
        by_speaker={str(g.group): g.counts.rate for g in found.words.by_speaker()},
        minutes=round(minutes, 2),
        epochs=epochs,
        threads=config.train.threads,
        training_hours=round(float(open_corpus(spoken).durations_N.sum()) / 3600, 2),
    )


def clip_interval(score: Score, clips: list[list[str]], samples: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap over clips: e_c errors in n_c uses of clip c; draw clips, sum(m_c e_c) / sum(m_c n_c).

    A word's error belongs to the clip it was spoken in; an inserted word to the clip before it.
    """
    used: dict[str, list[int]] = {}
    for reference, hypothesis, string in zip(score.references, score.hypotheses, clips, strict=True):
        place = 0
        for clip in string:
            used.setdefault(clip, [0, 0])[1] += 1
        for op in alignment(reference, hypothesis):
            owner = string[max(0, place - 1)] if op.kind == "insertion" else string[place]
            used[owner][0] += op.kind != "hit"
            place += op.kind != "insertion"
    errors_C, uses_C = np.array(list(used.values()), dtype=float).T
    drawn_MC = np.random.default_rng(SEED).multinomial(len(used), np.full(len(used), 1 / len(used)), size=samples)
    low, high = np.quantile((drawn_MC @ errors_C) / (drawn_MC @ uses_C), [0.025, 0.975])
    return float(low), float(high)


def _joined(rows: Corpus, out: Path, strings: int, clips: int | tuple[int, int], *, seed: int) -> Path:
    manifest = out / "manifest.jsonl"
    return manifest if manifest.exists() else join_clips(rows, out, strings=strings, clips=clips, seed=seed)
