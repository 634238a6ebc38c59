"""``manyvoice personalize``: a voice for every speaker of a manifest, in one job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from manyvoice.cli.console import Terminal, emit, settings_of, table
from manyvoice.errors import WorkError


def personalize(
    base: Annotated[str, typer.Argument(help="Model folder or hub id, the base.")],
    manifest: Annotated[list[str], typer.Argument(help="Manifests with speakers.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path("runs/voices"),
    by: Annotated[str, typer.Option(help="Field that tells the speakers apart.")] = "speaker",
    store: Annotated[str | None, typer.Option("--voices", help="Store; OUTPUT/voices if not given.")] = None,
    tenant: Annotated[str, typer.Option(help="Whose voices they are, in the store.")] = "default",
    method: Annotated[str, typer.Option(help="adapter, lora or scale.")] = "adapter",
    setting: Annotated[list[str] | None, typer.Option("--set", help="Of the method, as rank=8.")] = None,
    lr: Annotated[
        list[float] | None, typer.Option(help="Peak rate; several to choose from, speaker by speaker.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Steps of every speaker, at most.")] = 150,
    choose: Annotated[float, typer.Option(help="Of a speaker's utterances: a share, or how many.")] = 0.15,
    test: Annotated[float, typer.Option(help="Of a speaker's utterances: a share, or how many.")] = 0.3,
    adapt: Annotated[int | None, typer.Option(help="Learn from so many at most.")] = None,
    part: Annotated[str | None, typer.Option(help="Field that says adapt, choose or test.")] = None,
    general: Annotated[list[str] | None, typer.Option(help="Speech of others, not to be forgotten.")] = None,
    replay: Annotated[float, typer.Option(help="Of that, beside each of a speaker's own in a step.")] = 0.25,
    better: Annotated[
        float, typer.Option(help="A kept voice lowers the loss where it is chosen by this share.")
    ] = 0.05,
    worse: Annotated[float, typer.Option(help="A voice may make the loss on others larger by this share.")] = 0.1,
    sizes: Annotated[bool, typer.Option("--sizes", help="Train across the sizes of a supernet.")] = False,
    memory: Annotated[str, typer.Option(help="That speakers in training may take; more go in waves.")] = "2GiB",
    licence: Annotated[str | None, typer.Option(help="Of the speech, for the voices' cards.")] = None,
    seed: Annotated[int, typer.Option(help="Of splits, starts and order.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Say who would be trained on what, train nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Train a small submodel for each speaker, keep those that help, and report.

    Example: manyvoice personalize runs/mine/model speakers.jsonl --by speaker -o runs/voices
    """
    from manyvoice.data.manifest import open_corpus
    from manyvoice.recipes.personalize import Personalisation
    from manyvoice.recipes.personalize import personalize as run_job
    from manyvoice.recipes.speakers import Split
    from manyvoice.submodels.store import Store
    from manyvoice.train.owners import Schedule
    from manyvoice.train.profile import parse_bytes

    rates = lr or [Schedule.lr]
    wanted = Personalisation(
        method=method, settings=settings_of(setting or []), by=by,
        split=Split(choose=choose, test=test, adapt=adapt, field=part, seed=seed),
        schedule=Schedule(rounds=rounds, lr=rates[0]),
        lrs=tuple(rates) if len(rates) > 1 else (), sizes=sizes, replay=replay, better=better, worse=worse,
        memory=parse_bytes(memory), seed=seed, tenant=tenant, licence=licence,
    )  # fmt: skip
    try:
        with Terminal() as terminal:
            report = run_job(
                base, open_corpus(manifest), output, wanted, store=None if store is None else Store(store),
                general=open_corpus(general) if general else None, watcher=terminal, dry_run=dry_run,
            )  # fmt: skip
    except KeyboardInterrupt as error:
        raise WorkError("stopped; the same command goes on") from error
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun the first process speaks for all
    emit(report.as_dict(), as_json=as_json, text=f"{report.headline()}\n{report.sentence()}")
    if not as_json:
        columns, rows = report.table()
        table("", columns, [[escape(cell) for cell in row] for row in rows])
        for name, one in report.remarks():
            print(f"{name}: {one}")
        if not dry_run:
            print(f"{output / 'report.md'} says this too")


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(personalize)
