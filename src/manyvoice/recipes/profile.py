"""What ``manyvoice profile`` shows: sizes and why, of a run file; sizes and what padding cost, of a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from manyvoice.config import RunConfig
from manyvoice.data.padding import PaddingMeter, Waste, careless_padding
from manyvoice.data.plan import Plan
from manyvoice.errors import UsageError
from manyvoice.recipes.prepare import build_recogniser, open_corpora, plan_batches, trainable
from manyvoice.recipes.sizing import Sizer
from manyvoice.recipes.watch import Watcher
from manyvoice.train.distributed import start
from manyvoice.train.metrics import read_metrics


def profile_of_run(run: RunConfig, watcher: Watcher, *, again: bool = False) -> dict[str, Any]:
    """Measure, or remember, how many utterances of each bin fit; nothing is trained or written but the memory of it."""
    sizer = Sizer(run, start(run.train.precision), watcher, again=again)
    corpora = open_corpora(run.corpus, run.seed, watcher)
    recogniser = build_recogniser(run, corpora.train)
    train = trainable(corpora.train, recogniser, run.corpus.skip_bad, watcher)
    fresh = run.model_copy(update={"output": ""})  # sizes of a run that has begun are not what is asked
    _, _, plan, sizes = plan_batches(fresh, train, recogniser, sizer, watcher)
    assert sizes is not None
    counts = np.bincount(plan.cells(0), minlength=len(plan.bins)).tolist()
    found = sizer.profile
    rows = []
    for k, ((seconds, tokens), count, size) in enumerate(zip(plan.bins.cells, counts, sizes.used, strict=True)):
        row: dict[str, Any] = {"up to s": seconds, "tokens": tokens, "utterances": count, "size": size}
        if found is not None:
            row |= {"fit": found.sizes[k], "bound by": _bound(size, found.sizes[k], count)}
            row |= {"MiB": round(found.bytes_of[k] / 2**20)} if found.bytes_of else {}
        rows.append({**row, "padded s": round(size * seconds, 1)})
    waste = expected_waste(plan)
    careless = careless_padding(plan.durations_N, len(plan) / waste.steps, plan.seed)
    summary = [
        f"sizes: {sizes.source}",
        f"{plan.steps(0)} updates an epoch, {float(train.durations_N.sum()) / plan.steps(0):.0f} s of speech each",
        f"padding to expect: {waste.frame_padding:.1%} of frames, {waste.token_padding:.1%} of label columns; batches "
        f"of as many drawn at random would have {careless:.0%} of frames",
    ]
    if found is not None and found.confirmed is not None:
        summary.append(f"a real step took {found.confirmed:.2f} times the counted memory; sizes allow for that")
    return {"bins": rows, "summary": summary, "key": dict(found.key) if found else None}


def _bound(size: int, fit: int, count: int) -> str:
    if size < fit:
        return "updates"
    return "its utterances" if size >= count else "memory"


def profile_of_folder(folder: Path) -> dict[str, Any]:
    """What a run's batches wasted so far, by bin. UsageError for a folder that is no run's."""
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder}: holds no plan.json of a run ({error}); give a run's folder or a run file"
        ) from error
    lines = read_metrics(folder)
    meter = PaddingMeter(lines)
    total = meter.total()
    by_cell = meter.by_cell()
    rows = []
    for k, row in enumerate(plan["bins"]):
        waste = by_cell.get(k, Waste())
        rows.append(
            {
                "up to s": row["seconds"],
                "tokens": row["tokens"],
                "utterances": row["utterances"],
                "size": row["size"],
                "steps": waste.steps,
                "frames padded %": round(100 * waste.frame_padding, 1),
                "tokens padded %": round(100 * waste.token_padding, 1),
                "time %": round(100 * waste.seconds / total.seconds, 1) if total.seconds else 0.0,
            }
        )
    summary = [
        f"sizes: {plan['source']}",
        f"{plan['steps_per_epoch']} updates an epoch; {total.steps} so far",
        f"padding: {total.frame_padding:.1%} of frames, {total.token_padding:.1%} of label columns",
    ]
    for epoch in meter.epochs():
        waste = meter.total(epoch)
        summary.append(
            f"epoch {epoch + 1}: {waste.steps} updates, {waste.frame_padding:.1%} of frames and "
            f"{waste.token_padding:.1%} of label columns padded, {waste.audio_seconds / max(waste.seconds, 1e-9):.0f} "
            "s of audio a second"
        )
    if mixed := by_cell.get(-1):
        summary.append(f"{mixed.steps} steps had micro-batches of several bins")
    versions = max((int(line.get("plan_version", 0)) for line in lines), default=0)
    if versions:
        summary.append(
            f"memory ran out: the run is at plan version {versions}, its smaller sizes are in the checkpoint"
        )
    return {"bins": rows, "summary": summary}


def expected_waste(plan: Plan, epoch: int = 0) -> Waste:
    """Padding of an epoch, from durations and tokens alone: seconds stand for frames."""
    return _waste_of([micro for step in plan.epoch(epoch) for micro in step], plan)


def _waste_of(micro: list[np.ndarray], plan: Plan) -> Waste:
    d, u = plan.durations_N, plan.tokens_N
    return Waste(
        steps=len(micro),
        utterances=float(len(plan)),
        audio_seconds=float(d.sum()),
        frames=float(d.sum()),
        padded_frames=float(sum(len(m) * d[m].max() for m in micro)),
        label_tokens=float(u.sum()),
        padded_tokens=float(sum(len(m) * u[m].max() for m in micro)),
    )
