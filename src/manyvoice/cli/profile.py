"""``manyvoice profile``: how many utterances a batch holds and why, and what padding cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from manyvoice.cli.console import Terminal, emit, table


def profile(
    run: Annotated[Path, typer.Argument(help="Run file (YAML), or the folder of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as a.b=c, of a run file.")] = None,
    memory: Annotated[str | None, typer.Option(help="That training may take, such as 8GiB.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure even where the answer is remembered.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Measure how large a run's batches can be, or show what a run's batches wasted, bin by bin.

    Example: manyvoice profile run.yaml --memory 8GiB
    """
    from manyvoice.config import read_run
    from manyvoice.recipes.profile import profile_of_folder, profile_of_run

    with Terminal() as terminal:
        if run.is_dir():
            found = profile_of_folder(run)
        else:
            changes = [*(overrides or []), *([f"batch.memory={memory}"] if memory else [])]
            found = profile_of_run(read_run(run, changes), terminal, again=again)
    emit(found, as_json=as_json, text="")
    if not as_json:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    columns = list(found["bins"][0]) if found["bins"] else []
    table("", columns, [[_cell(row.get(c)) for c in columns] for row in found["bins"]])
    for line in found["summary"]:
        print(line)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(profile)
