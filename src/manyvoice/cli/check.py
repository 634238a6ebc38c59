"""``manyvoice check``: does a model's card tell the truth?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from manyvoice.cli.console import Terminal, emit
from manyvoice.errors import UsageError, WorkError


def check(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Where a corpus of the card is now, as test=path; dev likewise.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Recompute what a model's card claims: weights, parameters, data, error rates.

    Example: manyvoice check runs/mine/model --data test=test.jsonl
    """
    from manyvoice.recipes.card import check_model

    places = {}
    for item in data or []:
        role, equals, place = item.partition("=")
        if not equals or not role or not place:
            raise UsageError(f"--data {item!r}: must look like test=path/to/manifest.jsonl")
        places[role] = place
    with Terminal() as terminal:
        checks = check_model(model, data=places, watcher=terminal)
    marks = {True: "holds ", False: "WRONG ", None: "untried"}
    lines = [f"{marks[c.holds]}  {c.claim}: {c.found}" for c in checks]
    emit({"checks": [asdict(c) for c in checks]}, as_json=as_json, text="\n".join(lines))
    wrong = sum(c.holds is False for c in checks)
    if wrong:
        raise WorkError(f"{wrong} of {len(checks)} claims of {model} do not hold")


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(check)
