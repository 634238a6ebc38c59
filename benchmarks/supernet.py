"""One supernet run against models of the same sizes trained alone with the same updates.

    manyvoice bench supernet corpus=commands seeds=0,1,2     20 hours of synthetic commands, about 1,000 words
    manyvoice bench supernet corpus=commands alone=none      the supernet only; alone=100,25 only these two alone
    manyvoice bench supernet corpus=digits                   real digit strings, one seed
    manyvoice bench supernet part=search corpus=commands base=MODEL budgets=0.55,0.3 tries=10
                                                             uniform sizes against the best of random ones, which the
                                                             development part chooses and the test part reports
    manyvoice bench supernet part=gradients corpus=commands base=MODEL
                                                             how the others' gradients stand to the largest model's
    manyvoice bench supernet part=time corpus=commands       what a step of each arm takes, in turn on an idle machine
    manyvoice bench supernet part=speed                      each size of `small` against its share of the MACs

A model alone starts from the subnet of the same random weights that the supernet starts from, sees the same batches in
the same order, makes the same number of updates, and has the dropout that its widths have in the supernet. Where there
are several learning rates, each arm, and each size alone, is compared at the one that the development part prefers.
Rows that are there are not made again: the same command goes on. `manyvoice bench ablation` has what each technique is
worth.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manyvoice.config import make_run
from manyvoice.data.collate import Collator, Features, LiveFeatures
from manyvoice.data.join import join_clips
from manyvoice.data.manifest import open_corpus
from manyvoice.data.synth import SynthSpec, synthesise_splits
from manyvoice.decode.compare import COMPARISON_CORPUS, Arm, compare
from manyvoice.decode.evaluate import evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.distill import DIVERGENCES, frames_distilled
from manyvoice.elastic.extract import extract
from manyvoice.elastic.narrow import Elastic
from manyvoice.elastic.sizes import Grid, nested_sizes
from manyvoice.errors import UsageError, WorkError
from manyvoice.models.load import build_model
from manyvoice.recipes.bench import Aim, Bench
from manyvoice.recipes.find import Budget, find_sizes
from manyvoice.recipes.pareto import Point, draw
from manyvoice.recipes.prepare import build_recogniser
from manyvoice.recipes.sizes import load_size, read_sizes, speed_of
from manyvoice.recipes.train import train
from manyvoice.train.metrics import read_metrics
from manyvoice.train.objective import ctc_per_utterance, scores_of

SIZES = [1.0, 0.75, 0.55, 0.4, 0.25]
# what differs from the whole method, one thing at a time
ARMS: dict[str, dict[str, Any]] = {
    "supernet": {},
    "largest from the start": {"elastic": {"grow": 0.0}},
    "KL": {"elastic": {"distill": "kl"}},
    "alpha": {"elastic": {"distill": "alpha"}},
    "fixed dropout": {"elastic": {"dropout": False}},
    "AdamW": {"optimizer": {"name": "adamw"}},
    "Eden": {"optimizer": {"schedule": "eden"}},
    "no sandwich": {"elastic": {"sandwich": False}},
    # the others count for nothing once the smallest has grown: is the largest's gain from growing alone?
    "only the largest once grown": {"elastic": {"weight": 1e-9}},
    "one other at a time": {"elastic": {"others": 1}},
    "AlphaNet's": {"elastic": {"grow": 0.0, "distill": "alpha", "hard": 0.0, "others": 3, "named": 0.0}},
}
# Rows of these are from before a supernet grew; only a command that names them makes them again. Where a row's command
# names another arm, KL was the default then: its plain supernet is `KL` here, its `no distillation` the supernet.
EARLIER: dict[str, dict[str, Any]] = {
    "alpha, one other at a time": {"elastic": {"grow": 0.0, "others": 1, "named": 0.5, "distill": "alpha"}},
    "no distillation, others at 0.5": {
        "elastic": {"grow": 0.0, "others": 1, "named": 0.5, "distill": "none", "weight": 0.5}
    },
    "no distillation, two sizes at 0.5": {"elastic": {"grow": 0.0, "distill": "none", "weight": 0.5}},
}
# A model that hears 20 hours in five minutes; real digits have the preset's shape.
SMALL = {"hidden_size": 96, "intermediate_size": 384, "subsampling_factor": 8, "subsampling_conv_channels": 16}
SHAPES: dict[str, dict[str, int]] = {"digits": {}, "commands": SMALL, "strings": SMALL}
SCALED = 25.0  # ScaledAdam's rates are relative to a tensor's size: about so many times AdamW's
# 20.5 hours to train on, 0.7 to choose by, 3.2 to report; the parts share their voices, but no phrase
COMMANDS = SynthSpec(utterances=42_000, speakers=60, grammar="commands", noise=0.5, room=0.5, snr_db=(10, 25), seed=0)
COMMANDS_SHARES = {"train": 0.84, "dev": 0.03, "test": 0.13}
STRINGS = 4000
COST, FASTER = 2.0, 2.5
CLIPS = 200  # of the real digits that report
SEEDS = {"commands": 3}  # that a comparison wants; of real speech one
TIMED = 2400  # utterances of a timed run: about 150 steps of 30 seconds of commands, most of which train all sizes
WARM, FEWEST = 5, 20  # steps left out at the start, and steps that a median wants
ARMS_FOLDER = re.compile(r",? +")
# A rate of the encoder that follows a width in a supernet, and that width.
DROPOUTS = {"activation_dropout": "intermediate_size", "attention_dropout": "num_attention_heads"}
# rows of the supernet, rows of models alone, and the seeds of both
Pair = tuple[list[dict[str, Any]], list[dict[str, Any]], list[int]]
ONNX_SPEED = """
import sys, time, numpy, onnxruntime
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feeds = {"audio_signal": numpy.zeros((1, 80, 1001), "float32"), "length": numpy.array([1001])}
times = []
for _ in range(7):
    t = time.perf_counter(); session.run(None, feeds); times.append(time.perf_counter() - t)
print(sorted(times[2:])[2])
"""


def run(bench: Bench) -> None:
    """Train what is not there yet, then compare."""
    part, name = bench.option("part", "sizes"), bench.option("corpus", "digits")
    if part == "speed":
        speed(bench)
    elif part == "search":
        search(bench, name)
    elif part == "time":
        timing(bench, name)
    elif part == "gradients":
        gradients(bench, name)
    elif part == "sizes":
        lr = float(bench.option("lr", "0.02"))
        for seed in map(int, bench.option("seeds", "0").split(",")):
            if bench.option("alone", "all") in ("all", "none"):
                supernet(bench, name, "supernet", seed, lr)
            for share in shares_alone(bench):
                alone(bench, name, share, seed, lr)
    elif part != "aims":
        known = "sizes, search, gradients, time, speed, or aims of what is there"
        raise UsageError(f"part={part}: must be {known}")
    aims(bench)


def shares_alone(bench: Bench) -> list[float]:
    """Which sizes are trained alone: all, none, or some, without the supernet, so that processes can share the work."""
    asked = bench.option("alone", "all")
    every = SIZES[::4] if bench.toy else SIZES
    return every if asked == "all" else [s for s in every if f"{100 * s:.0f}" in asked.split(",")]


def corpora(bench: Bench, name: str) -> tuple[str, str, str]:
    """Manifests to train on, to choose by, and to report."""
    folder = bench.work / name
    kind, _, count = name.partition("-")
    if kind == "digits":
        digits = bench.data / "digits"
        clips = open_corpus(digits / "train.jsonl").split("utterance", {"train": 0.9, "dev": 0.1}, seed=0)
        sources = {"train": clips["train"], "dev": clips["dev"], "test": open_corpus(digits / "test.jsonl")}
        strings = {"train": int(count or 4000), "dev": 300, "test": 1500}
        strings = {"train": 40, "dev": 8, "test": 8} if bench.toy else strings
        for seed, (part, rows) in enumerate(sources.items()):
            if not (folder / part / "manifest.jsonl").exists():
                join_clips(rows, folder / part, strings=strings[part], clips=(1, 6), seed=seed)
        train, dev, test = (str(folder / part / "manifest.jsonl") for part in sources)
        return train, dev, test
    if name != "commands" and kind != "strings":
        raise UsageError(f"corpus={name}: must be commands, digits, digits-2000 or strings-4000 (of so many strings)")
    made = folder / "made.json"
    if not made.exists():
        spec, shares = spoken_strings(int(count or STRINGS)) if kind == "strings" else (COMMANDS, COMMANDS_SHARES)
        if bench.toy:
            spec, shares = replace(spec, utterances=60, speakers=6), COMMANDS_SHARES
        parts = synthesise_splits(
            spec, folder, shares, jobs=int(bench.option("jobs", "1")),
            progress=lambda d, n: bench.watcher.progress("speaking", d, n),
        )  # fmt: skip
        made.write_text(json.dumps({k: str(v) for k, v in parts.items()}), encoding="utf-8")
    where = json.loads(made.read_text(encoding="utf-8"))
    return where["train"], where["dev"], where["test"]


def spoken_strings(count: int) -> tuple[SynthSpec, dict[str, float]]:
    """Digit strings in noise to train on, and others to choose by and to report on."""
    every = {"train": count, "dev": 400, "test": 5600}  # over 20,000 words to report on
    spec = replace(COMMANDS, utterances=sum(every.values()), grammar="digits", words=(2, 6), noise=1.0, snr_db=(0, 10))
    return spec, {part: n / spec.utterances for part, n in every.items()}


def settings(bench: Bench, name: str, output: Path, seed: int, lr: float) -> dict[str, Any]:
    """The run that all arms share."""
    train, dev, _ = corpora(bench, name)
    shape = {"dropout": 0.05, "activation_dropout": 0.1, "attention_dropout": 0.1}
    toy = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "subsampling_conv_channels": 8}
    return {
        "output": str(output),
        "seed": seed,
        "corpus": {"train": train, "dev": dev, "licence": "CC-BY-SA-4.0", "cache": str(bench.work / "features")},
        "tokenizer": {"kind": "words", "size": 2000},
        "model": {"settings": shape | (toy if bench.toy else SHAPES[name.partition("-")[0]])},
        "augment": {"freq_masks": 1, "time_masks": 1},
        "batch": {"seconds": budget(bench)["batch_seconds"]},
        "optimizer": {"name": budget(bench)["optimizer"], "lr": lr, "warmup": 0.2},
        "train": {"epochs": budget(bench)["epochs"], "threads": 1},
    }


def supernet(bench: Bench, name: str, arm: str, seed: int, lr: float) -> None:
    """A row for each size of one supernet run."""
    same = {"kind": "size", "corpus": name, "arm": arm, "seed": seed, "lr": lr, **budget(bench)}
    sizes = SIZES[::4] if bench.toy else SIZES
    if len(bench.find(**same)) == len(sizes):
        return
    model, told = trained(bench, name, arm, seed, lr)
    for size in read_sizes(model, Recogniser.load(model)):
        if not bench.find(**same, size=size.subnet.name):
            row(bench, load_size(model, size.subnet.name), same, size=size.subnet.name,
                layer_macs=size.document["costs"]["layer_macs"], dev_wer=size.document["results"]["dev"]["wer"],
                **told)  # fmt: skip


def trained(bench: Bench, name: str, arm: str, seed: int, lr: float) -> tuple[Path, dict[str, Any]]:
    """A supernet of that arm, and what a row tells of its training; made only once."""
    output = bench.work / "runs" / f"{name}-{ARMS_FOLDER.sub('-', arm)}-{seed}-{lr:g}"
    return _run(bench, elastic_settings(bench, name, arm, output, seed, lr))


def _run(bench: Bench, made: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    config = make_run(made)
    model = train(config, watcher=bench.watcher, command=f"manyvoice bench {bench.question}")
    steps = round(sum(line["seconds"] for line in read_metrics(Path(config.output))), 1)
    # the rate of the row is every arm's; an optimiser of another kind has its own
    return model, {
        "train_seconds": steps,
        "trained_by": config.optimizer_name,
        "trained_lr": config.optimizer.lr,
    }


def elastic_settings(bench: Bench, name: str, arm: str, output: Path, seed: int, lr: float) -> dict[str, Any]:
    """The run of one arm of the supernet."""
    made = settings(bench, name, output, seed, lr)
    different = (ARMS | EARLIER).get(arm)
    if different is None:
        raise UsageError(f"arms={arm}: must be some of {'|'.join(ARMS | EARLIER)}")
    made["elastic"] = {"sizes": SIZES[::4] if bench.toy else SIZES} | different.get("elastic", {})
    made["optimizer"] |= different.get("optimizer", {})
    if made["optimizer"]["name"] != budget(bench)["optimizer"]:
        made["optimizer"]["lr"] = lr / SCALED
    return made


def alone(bench: Bench, name: str, share: float, seed: int, lr: float) -> None:
    """One row: a model of that size trained by itself."""
    size = f"{100 * share:.0f}"
    same = {"kind": "size", "corpus": name, "arm": "alone", "seed": seed, "lr": lr, **budget(bench)}
    if bench.find(**same, size=size):
        return
    output = bench.work / "runs" / f"{name}-alone-{size}-{seed}-{lr:g}"
    made, layer_macs = alone_settings(bench, name, size, output, seed, lr)
    model, told = _run(bench, made)
    recogniser = Recogniser.load(model)
    dev = evaluate(recogniser, open_corpus(corpora(bench, name)[1])).words.rate
    row(bench, recogniser, same, size=size, layer_macs=layer_macs, dev_wer=dev, **told)


def alone_settings(
    bench: Bench, name: str, size: str, output: Path, seed: int, lr: float
) -> tuple[dict[str, Any], float]:
    """The run of a model of that size by itself, from the subnet that the supernet begins with; MACs of its layers."""
    made = settings(bench, name, output, seed, lr)
    start = output.with_name(f"{output.name}-start")
    config = make_run(made)
    torch.manual_seed(seed)  # as training does before it builds its model
    whole = build_recogniser(config, open_corpus(made["corpus"]["train"]))
    grid = Grid(whole.model, whole.family)
    subnet = next(s for s in nested_sizes(grid, SIZES) if s.name == size)
    small = extract(Elastic(whole.model), subnet)
    for rate, width in DROPOUTS.items():
        kept = getattr(small.config.encoder_config, width) / getattr(whole.model.config.encoder_config, width)
        setattr(small.config.encoder_config, rate, kept * getattr(small.config.encoder_config, rate))
    Recogniser(small, whole.family, whole.tokenizer, whole.log_mel).save(start)
    made["model"] = {"base": str(start), "freeze_batchnorm": False}
    return made, grid.costs(subnet).layer_macs


def timing(bench: Bench, name: str) -> None:
    """Rows of the median time of a step, the arms in turn on the same batches: an idle machine is wanted."""
    lr, few = float(bench.option("lr", "0.02")), {}
    for part, count in zip(("train", "dev"), (12, 4) if bench.toy else (TIMED, 20), strict=True):
        whole = Path(corpora(bench, name)[("train", "dev").index(part)])
        few[part] = whole.with_name("few.jsonl")
        lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
        few[part].write_text("".join(lines[:count]), encoding="utf-8")
    arms = bench.option("arms", "supernet").split("|")
    shares = SIZES[::4] if bench.toy else SIZES
    for turn in range(1 if bench.toy else int(bench.option("turns", "3"))):
        for what in (*arms, *(f"{100 * share:.0f}" for share in shares)):
            output = bench.work / "timed" / f"{name}-{ARMS_FOLDER.sub('-', what)}-{turn}"
            shutil.rmtree(output, ignore_errors=True)
            if what in arms:
                made = elastic_settings(bench, name, what, output, turn, lr)
            else:
                made, _ = alone_settings(bench, name, what, output, turn, lr)
            made["corpus"] |= {part: str(path) for part, path in few.items()}
            made["batch"]["updates"], made["train"]["epochs"] = 1, 1
            config = make_run(made)
            train(config, watcher=bench.watcher)
            steps = read_metrics(output)
            took = seconds_per_step(steps, round(config.grow * len(steps)), few=1 if bench.toy else FEWEST)
            bench.row(
                seed=turn, kind="time", corpus=name, arm=what if what in arms else "alone", steps=len(steps),
                size="all" if what in arms else what, batch_seconds=budget(bench)["batch_seconds"],
                seconds_per_step=round(took, 5),
            )  # fmt: skip


def seconds_per_step(lines: list[dict[str, Any]], grown: int, *, few: int = FEWEST) -> float:
    """Medians of the steps that train the smallest size alone and of the rest, by how many there are of each.

    While the largest says nothing the others wait for it, which in a run as short as this is often and in a whole one
    hardly: those steps are left out. WorkError if fewer than ``few`` are left of a part.
    """
    parts = [part for part in (lines[:grown], lines[grown:]) if part]
    # the first steps of a run are slow
    used = [part[WARM:] if len(part) > WARM and k == 0 else part for k, part in enumerate(parts)]
    used[-1] = [line for line in used[-1] if line.get("loss_subnets", 1.0) > 0]
    if min(map(len, used)) < few:
        raise WorkError(f"only {min(map(len, used))} steps can be timed; take more utterances")
    medians = [float(np.median([line["seconds"] for line in part])) for part in used]
    return sum(len(part) * median for part, median in zip(parts, medians, strict=True)) / len(lines)


def budget(bench: Bench) -> dict[str, Any]:
    """What two arms must share to be compared."""
    return {"epochs": 1 if bench.toy else int(bench.option("epochs", "4")),
            "batch_seconds": float(bench.option("seconds", "40")),
            "optimizer": bench.option("optimizer", "scaledadam"),
            # rows without this had those of training, but for a supernet's smaller sizes, always measured anew
            "statistics": "of training or anew, by dev"}  # fmt: skip


def row(
    bench: Bench, model: Recogniser, same: dict[str, Any], *, features: Features | None = None, **more: Any
) -> None:
    """One size of one arm, on the test part."""
    found = evaluate(model, open_corpus(corpora(bench, same["corpus"])[2]), features=features)
    bench.row(
        **same, wer=found.words.rate, wer_interval=list(found.words.interval()),
        errors=[c.errors for c in found.words.counts], words=[c.reference for c in found.words.counts], **more,
    )  # fmt: skip


def search(bench: Bench, name: str) -> None:
    """Rows for each budget: the balanced uniform subnet, the best of some at random, and the size that was trained."""
    base, tries = bench.option("base", ""), 2 if bench.toy else int(bench.option("tries", "10"))
    _, dev, test = (open_corpus(path) for path in corpora(bench, name))
    for limit in map(float, bench.option("budgets", "0.55,0.3").split(",")):
        found = find_sizes(base, dev, Budget(limit=limit, of="macs"), tries=tries, test=test, watcher=bench.watcher)
        for one in found:
            bench.row(seed=0, kind="search", corpus=name, base=Path(base).parent.name, budget=limit, **one)


def gradients(bench: Bench, name: str) -> None:
    """A row for each size and loss: its gradient's length beside the largest model's CTC, and the cosine of the two."""
    base = bench.option("base", "")
    recogniser = Recogniser.load(base)
    model, blank = recogniser.model, recogniser.family.blank(recogniser.model)
    rows = open_corpus(corpora(bench, name)[1])
    corpus = rows.subset(range(0, len(rows), max(1, len(rows) // 64)))
    tokens = [recogniser.tokenizer.encode(text) for text in corpus.texts()]
    batch = Collator(corpus, LiveFeatures(corpus, recogniser.log_mel), tokens)(range(len(corpus)))
    elastic, labels = Elastic(model), batch.token_len_B.sum()

    def gradient() -> torch.Tensor:
        found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
        return found

    scores = scores_of(model, batch)
    teacher_BTV, mask_BT = scores.x.detach(), scores.mask_BT()
    (ctc_per_utterance(scores, batch.tokens_BU, batch.token_len_B, blank).sum() / labels).backward()
    first = gradient()
    for size in read_sizes(Path(base), recogniser)[1:]:
        for loss in ("labels", *DIVERGENCES):
            with elastic.at(size.subnet, statistics=size.statistics):
                scores = scores_of(model, batch)
                if loss == "labels":
                    loss_B = ctc_per_utterance(scores, batch.tokens_BU, batch.token_len_B, blank)
                else:
                    loss_B = frames_distilled(DIVERGENCES[loss], teacher_BTV, scores.x, mask_BT)
                (loss_B.sum() / labels).backward()
            found = gradient()
            bench.row(
                seed=0, kind="gradient", corpus=name, base=Path(base).parent.name, size=size.subnet.name, loss=loss,
                length_to_the_largest=round(float(found.norm() / first.norm()), 3),
                cosine_with_the_largest=round(float(torch.nn.functional.cosine_similarity(found, first, dim=0)), 3),
            )  # fmt: skip


def speed(bench: Bench) -> None:
    """A row for each size: how much faster than the largest, in torch and in ONNX Runtime, one thread."""
    from manyvoice.export.onnx import export_onnx

    preset = "tiny" if bench.toy else bench.option("preset", "small")
    config = make_run({"output": str(bench.work), "corpus": {"train": "none"}, "model": {"preset": preset}})
    torch.manual_seed(0)
    model, family = build_model(config.model.preset or preset, {}, vocabulary=257, blank=256)
    base = _untrained(bench, model, family)
    grid = Grid(model, family)
    largest: dict[str, float] = {}
    for subnet in nested_sizes(grid, SIZES[::4] if bench.toy else SIZES):
        small = Recogniser(extract(Elastic(model), subnet), family, base.tokenizer, base.log_mel)
        folder = bench.work / "onnx" / f"{preset}-{subnet.name}"
        exported = export_onnx(small, folder)
        told = subprocess.run([sys.executable, "-c", ONNX_SPEED, str(exported.model)], capture_output=True, text=True,
                              check=True)  # fmt: skip
        times = {"torch": speed_of(small).median, "onnx": float(told.stdout)}
        largest = largest or times
        bench.row(
            seed=0, kind="speed", preset=preset, size=subnet.name, share=round(grid.share(subnet), 4),
            share_with_front=round(grid.costs(subnet).macs / grid.costs(nested_sizes(grid, [1.0])[0]).macs, 4),
            **{f"{k}_times_faster": round(largest[k] / t, 3) for k, t in times.items()},
            **{f"{k}_ms": round(1000 * t, 1) for k, t in times.items()},
        )  # fmt: skip


def _untrained(bench: Bench, model: Any, family: Any) -> Recogniser:
    """With a tokenizer that fits the preset's vocabulary; its words do not matter."""
    from manyvoice.data.features import LogMel
    from manyvoice.data.tokens import train_tokenizer

    words = [f"{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(255)]
    tokenizer = train_tokenizer(words, "words", size=300, normalise=True)
    return Recogniser(model, family, tokenizer, LogMel.build(family.features(model)))


def aims(bench: Bench) -> None:
    """From all rows so far, each corpus by the settings that most seeds of both arms share."""
    bench.aims = []
    for name in sorted({r["corpus"] for r in bench.find(kind="size")}):
        rows = bench.find(kind="size", corpus=name)
        for arm in [arm for arm in ("supernet", "KL") if any(r["arm"] == arm for r in rows)]:
            pairs = _pairs([r for r in rows if r["arm"] in (arm, "alone")])
            if "100" in pairs:
                bench.aims.append(_sizes(bench, name, arm, pairs))
                if arm == "supernet":
                    bench.aims.append(_time(bench, name))
                if arm == "supernet" and not bench.toy:
                    _picture(bench, name, pairs)
    for found in bench.find(kind="speed", size="25", preset="tiny" if bench.toy else "small")[-1:]:
        bench.aims.append(
            Aim(name=f"{found['preset']}: a quarter of the MACs, torch, one thread", sense="at least", limit=FASTER,
                unit="times faster", measured=found["torch_times_faster"],
                why=f"ONNX Runtime {found['onnx_times_faster']} times; {found['share']:.0%} of the layers' MACs, "
                    f"{found['share_with_front']:.0%} of all")
        )  # fmt: skip


def _sizes(bench: Bench, name: str, arm: str, pairs: dict[str, Pair]) -> Aim:
    """How many sizes of an arm are not inferior to models alone, and what each comparison says."""
    # an error floor or ceiling tells nothing of any size: the largest model alone says whether there is one
    rate = float(np.mean([r["wer"] for r in pairs["100"][1]]))
    void = not COMPARISON_CORPUS[0] <= rate <= COMPARISON_CORPUS[1]
    verdicts = {}
    for size, (ours, theirs, _) in pairs.items():
        words = theirs[0]["words"]
        new, base = (
            Arm(name=a, errors=[r["errors"] for r in found], reference_words=words)
            for a, found in ((arm, ours), ("alone", theirs))
        )
        verdicts[size] = compare(new, base, synthetic=not name.startswith("digits"))
        bench.watcher.note(f"{name}, size {size}: {verdicts[size].sentence()}")
    seeds = {s: len(found[2]) for s, found in pairs.items()}
    enough = SEEDS.get(name, 1)
    held = 0 if void else sum(v.holds and seeds[s] >= enough for s, v in verdicts.items())
    why = f"void: the largest alone is at {rate:.1%} WER; " if void else ""
    # strings that share their clips are not independent
    why += (
        f"the test strings are made of {CLIPS} clips, so bounds are too narrow; " if name.startswith("digits") else ""
    )
    why += "" if min(seeds.values()) >= enough else f"{enough} seeds are wanted; "
    told = {
        s: f"rates {ours[0]['lr']:g} and {theirs[0]['lr']:g}; {verdicts[s].sentence()}"
        for s, (ours, theirs, _) in pairs.items()
    }
    return Aim(
        name=f"{name}: sizes{'' if arm == 'supernet' else f' of {arm}'} not inferior to a model trained alone",
        sense="equal", limit=len(SIZES), unit="sizes", measured=float(held),
        why=why + "; ".join(f"{s} (seeds: {seeds[s]}): {said}" for s, said in told.items()),
    )  # fmt: skip


def _picture(bench: Bench, name: str, pairs: dict[str, Pair]) -> None:
    whole = pairs["100"][0][0]["layer_macs"]
    bars = "bars: lowest and highest seed" if len(pairs["100"][2]) > 1 else "one seed"
    lines = {f"{a} ({bars})": [_point(found[k], whole) for found in pairs.values()]
             for k, a in enumerate(("one supernet", "each alone"))}  # fmt: skip
    draw(lines, bench.path.parent / f"supernet-{name}.png")


def _point(rows: list[dict[str, Any]], whole: int) -> Point:
    """One size of one arm: the mean over its seeds and how far they lie apart; of a single seed its interval."""
    rates = [r["wer"] for r in rows]
    ends = (min(rates), max(rates)) if len(rows) > 1 else rows[0]["wer_interval"]
    return rows[0]["layer_macs"] / whole, float(np.mean(rates)), ends


def _time(bench: Bench, name: str) -> Aim:
    """Of all sizes by one run, in runs of the largest alone with as many steps; timed in turn."""
    step: dict[str, list[float]] = {}
    for r in bench.find(kind="time", corpus=name):
        if r["arm"] in ("supernet", "alone"):
            step.setdefault(r["size"], []).append(r["seconds_per_step"])
    spent, why = None, "not timed: runs that shared their machine with others do not tell; `part=time` does"
    if "all" in step and "100" in step:
        took = {size: float(np.median(seconds)) for size, seconds in step.items()}
        spent = round(took.pop("all") / took["100"], 3)
        why = f"median steps, timed in turn; the {len(took)} alone take {sum(took.values()) / took['100']:.2f}"
    return Aim(
        name=f"{name}: training time of all sizes", sense="at most", limit=COST, unit="largest-model runs",
        measured=spent, why=why,
    )  # fmt: skip


def _pairs(rows: list[dict[str, Any]]) -> dict[str, Pair]:
    """Rows of an arm and of models alone for each size, largest first, and the seeds that both have.

    Only rows of one number of epochs, batch size and so on are compared: those that most seeds share. Of several rates
    the arm has the one that its sizes together prefer on the development part, and each size alone its own.
    """

    def shared(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["epochs"], r.get("batch_seconds"), r.get("optimizer"), r.get("statistics")

    def paired(settings: tuple[Any, ...]) -> dict[str, Pair]:
        alike = [r for r in rows if shared(r) == settings]
        ours, found = best_rate([r for r in alike if r["arm"] != "alone"]), {}
        for size in dict.fromkeys(f"{100 * s:.0f}" for s in SIZES):
            mine = {r["seed"]: r for r in ours if r["size"] == size}
            theirs = {r["seed"]: r for r in best_rate([r for r in alike if r["arm"] == "alone" and r["size"] == size])}
            if seeds := sorted(set(mine) & set(theirs)):
                found[size] = [mine[s] for s in seeds], [theirs[s] for s in seeds], seeds
        return found

    every = [paired(settings) for settings in dict.fromkeys(map(shared, rows))]
    return max(every, key=lambda found: sum(len(pair[2]) for pair in found.values()), default={})


def best_rate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the learning rate that has most of them, and of those the one best on the development part."""
    rates: dict[float, list[dict[str, Any]]] = {}
    for r in rows:
        rates.setdefault(r["lr"], []).append(r)
    return min(rates.values(), key=lambda of: (-len(of), sum(r["dev_wer"] for r in of)), default=[])
