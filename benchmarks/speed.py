"""How fast a recogniser runs: real-time factor with warm-up, by length of the recordings and size of the batch.

    manyvoice bench speed                          the presets with random weights: speed does not depend on them
    manyvoice bench speed model=runs/mine/model    a model of yours

From samples to text by greedy search, features included. One thread unless threads=N.
"""

from __future__ import annotations

import numpy as np
import torch

from manyvoice.data.features import LogMel
from manyvoice.data.tokens import train_tokenizer
from manyvoice.decode.evaluate import greedy_decoder
from manyvoice.decode.recogniser import Recogniser
from manyvoice.decode.speed import measure_speed
from manyvoice.models.anatomy import anatomy_of, parameter_count
from manyvoice.models.load import build_model
from manyvoice.recipes.bench import Bench
from manyvoice.types import Seconds

SEED = 0
RATE = 16_000
# (seconds of each recording, recordings in a batch)
SHAPES = ((10.0, 1), (10.0, 8), (30.0, 1))
PRESETS = ("tiny", "small", "medium")


def run(bench: Bench) -> None:
    """A row for each model and shape."""
    torch.set_num_threads(int(bench.option("threads", "1")))
    chosen = bench.option("model", "")
    presets = ("tiny",) if bench.toy else tuple(bench.option("presets", ",".join(PRESETS)).split(","))
    for name in [chosen] if chosen else presets:
        recogniser = Recogniser.load(chosen) if chosen else _untrained(name)
        for seconds, batch in SHAPES[: 1 if bench.toy else None]:
            _measure(bench, name, recogniser, seconds, batch)
            bench.watcher.note(f"{name}: {batch} x {seconds:.0f} s done")


def _untrained(preset: str) -> Recogniser:
    """Random weights and 256 pieces, as the default run file gives."""
    torch.manual_seed(SEED)
    letters = [chr(c) for c in range(97, 123)]
    tokenizer = train_tokenizer([" ".join(letters)], "characters")
    model, family = build_model(preset, {}, vocabulary=len(tokenizer), blank=tokenizer.blank)
    return Recogniser(model.eval(), family, tokenizer, LogMel.build(family.features(model)))


def _measure(bench: Bench, name: str, recogniser: Recogniser, seconds: float, batch: int) -> None:
    rng = np.random.default_rng(SEED)
    sounds = [rng.normal(0, 0.1, round(seconds * RATE)).astype(np.float32) for _ in range(batch)]
    decode = greedy_decoder(recogniser)
    speed = measure_speed(lambda: decode(recogniser.logp_of(sounds)), seconds * batch, repeats=2 if bench.toy else 5)
    anatomy = anatomy_of(recogniser.model)
    frames = recogniser.encoder_frames(Seconds(10.0))
    macs = sum((c.cost.macs(frames) for c in anatomy.components), anatomy.front.macs(frames))
    bench.row(
        seed=SEED,
        model=name if "/" not in name else "given",
        seconds=seconds,
        batch=batch,
        threads=torch.get_num_threads(),
        rtf=speed.rtf,
        times_real_time=speed.rtfx,
        spread=speed.spread,
        parameters=parameter_count(recogniser.model),
        macs_at_10_s=macs,
    )
