"""``manyvoice train``: a run file to a model folder."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from manyvoice.cli.console import Terminal, emit


def train(
    run: Annotated[Path, typer.Argument(help="Run file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as a.b=c.")] = None,
    resume_from: Annotated[
        str | None, typer.Option("--from", help="Checkpoint to go on from, such as step-00000900.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check run file and corpora, show the plan, train nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Train a model, or go on where the same command was stopped.

    Example: manyvoice train run.yaml train.epochs=5
    """
    from manyvoice.config import read_run
    from manyvoice.recipes.card import read_card
    from manyvoice.recipes.prepare import dry_run as look
    from manyvoice.recipes.sizing import Sizer
    from manyvoice.recipes.train import train as run_training
    from manyvoice.train.distributed import start

    config = read_run(run, overrides or [])
    with Terminal() as terminal:
        if dry_run:
            found = look(config, terminal, Sizer(config, start(config.train.precision), terminal))
            emit(found, as_json=as_json, text="\n".join(f"{k}: {v}" for k, v in found.items()))
            return
        command = shlex.join(["manyvoice", *sys.argv[1:]])
        folder = run_training(config, watcher=terminal, command=command, resume_from=resume_from)
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun the first process speaks for all
    card = read_card(folder)
    rates = [f"{role}: WER {r['wer']:.2%}, CER {r['cer']:.2%}" for role, r in card["results"].items()]
    emit({"model": str(folder), "results": card["results"]}, as_json=as_json, text="\n".join([*rates, f"{folder}"]))


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(train)
