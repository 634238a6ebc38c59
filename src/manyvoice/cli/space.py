"""``manyvoice space``: train the space of voices in which new speakers are enrolled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from manyvoice.cli.console import Terminal, emit, settings_of
from manyvoice.errors import WorkError

# Speakers left out that are named.
_NAMED = 5


def space(
    base: Annotated[str, typer.Argument(help="Model folder or hub id, the base.")],
    manifest: Annotated[list[str], typer.Argument(help="Manifests with many speakers.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the space.")] = Path("runs/space"),
    by: Annotated[str, typer.Option(help="Field that tells the speakers apart.")] = "speaker",
    method: Annotated[str, typer.Option(help="generated or mixture.")] = "generated",
    setting: Annotated[list[str] | None, typer.Option("--set", help="Of the method, as dim=8.")] = None,
    rounds: Annotated[int, typer.Option(help="Steps of every speaker, at most.")] = 100,
    lr: Annotated[float, typer.Option(help="Peak rate of what is a speaker's own.")] = 1e-2,
    shared_lr: Annotated[float, typer.Option(help="Peak rate of what they share.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of splits, starts and order.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Train a space: what many speakers' voices share, and how a voice follows from a few numbers.

    Then `manyvoice enrol` finds a new speaker's place in it, from seconds of speech.

    Example: manyvoice space runs/mine/model speakers.jsonl -o runs/space
    """
    from manyvoice.data.manifest import open_corpus
    from manyvoice.recipes.space import SpaceTraining, read_report, train_space
    from manyvoice.train.owners import Schedule

    wanted = SpaceTraining(
        method=method, settings=settings_of(setting or []), by=by,
        schedule=Schedule(rounds=rounds, lr=lr, shared_lr=shared_lr), seed=seed,
    )  # fmt: skip
    try:
        with Terminal() as terminal:
            path = train_space(base, open_corpus(manifest), output, wanted, terminal)
    except KeyboardInterrupt as error:
        raise WorkError("stopped; the same command goes on") from error
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun the first process speaks for all
    report = read_report(output)
    emit({"space": str(path), **report}, as_json=as_json, text=_text(path, report))


def _text(path: Path, report: dict[str, Any]) -> str:
    from manyvoice.recipes.space import worth_of_prediction

    measured, predictor, left_out = report["measured"], report["predictor"], report["left_out"]
    low, high = measured["interval_over_speakers"]
    return "\n".join(
        [
            f"{path}: {len(report['speakers'])} speakers, {report['numbers_per_voice']} numbers a voice",
            *(f"left out: {name!r}, {why}" for name, why in list(left_out.items())[:_NAMED]),
            *([f"and {len(left_out) - _NAMED} more, in report.json"] if len(left_out) > _NAMED else []),
            f"their utterances that were held out, against the base: {measured['relative_nats']:+.1%} nats "
            f"({low:+.1%} to {high:+.1%}), CER {measured['cer'][0]:.2%} to {measured['cer'][1]:.2%}",
            "from 2 to 15 s of speech, " + worth_of_prediction(predictor["r2"], "speakers left out"),
        ]
    )


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(space)
