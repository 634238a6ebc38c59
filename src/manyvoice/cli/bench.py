"""``manyvoice bench``: run a benchmark of the checkout and print its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from manyvoice.cli.console import Terminal, emit, table

# Stamps of every row; they stand in the JSON and would only widen the table.
_STAMPS = {"date", "commit", "machine", "command", "seed"}


def bench(
    question: Annotated[str | None, typer.Argument(help="Which benchmark; none lists them.")] = None,
    options: Annotated[list[str] | None, typer.Argument(help="Its options as name=value; toy=1 is quick.")] = None,
    work: Annotated[Path | None, typer.Option(help="Scratch folder; what is there is used again.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Measure, and append the result to benchmarks/results/.

    Example: manyvoice bench speed
    """
    from manyvoice.recipes.bench import find_folder, questions, run_question

    if question is None:
        names = questions(find_folder())
        emit({"questions": names}, as_json=as_json, text="\n".join(names))
        return
    with Terminal() as terminal:
        document = run_question(question, options or [], terminal, work=work)
    if as_json:
        emit(document, as_json=True, text="")
        return
    _show(document)


def _show(document: dict[str, Any]) -> None:
    """A line a row, then the aims: rows have more columns than a terminal."""
    for row in document["rows"]:
        told = [f"{name} {_cell(value)}" for name, value in row.items() if name not in _STAMPS]
        print(f"{row['date']}  {', '.join(told)}")
    aims = [[a["name"], a["aim"], _cell(a["measured"]), "yes" if a["holds"] else "no"] for a in document["aims"]]
    if aims:
        table("", ["aim", "limit", "measured", "holds"], aims)


# An interval is shown, the errors of every utterance are not.
_SHOWN = 4


def _cell(value: object) -> object:
    if isinstance(value, list):
        if len(value) > _SHOWN:
            return f"{len(value)} numbers"
        return " to ".join(str(_cell(v)) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else value


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(bench)
