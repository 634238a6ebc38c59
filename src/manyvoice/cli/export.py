"""``manyvoice export``: a model, or one of its sizes, for runtimes without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from manyvoice.cli.console import Terminal, emit
from manyvoice.errors import UsageError


def export(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    to: Annotated[str, typer.Option(help="onnx.")] = "onnx",
    size: Annotated[str | None, typer.Option(help="One of a supernet's sizes, such as 55.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("onnx"),
    int8: Annotated[bool, typer.Option("--int8", help="Also with quantised weights.")] = False,
    measure: Annotated[str | None, typer.Option(help="Manifest on which to measure what the files cost.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Write ONNX that ONNX Runtime and sherpa-onnx run, once its answers are torch's.

    Example: manyvoice export runs/mine/model --size 40 --int8 --measure test.jsonl -o phone/
    """
    if to != "onnx":
        raise UsageError(f"--to {to}: onnx is the only form so far")
    from manyvoice.data.manifest import open_corpus
    from manyvoice.recipes.export import export as run_export

    corpus = None if measure is None else open_corpus(measure)
    with Terminal() as terminal:
        made, rates = run_export(model, output, size=size, int8=int8, corpus=corpus, watcher=terminal)
    document: dict[str, Any] = {"model": str(made.model), "tokens": str(made.tokens), "parity": made.parity}
    lines = [f"{made.model}: {made.bytes / 1e6:.1f} MB, differs from torch by {made.parity:.1g} at most"]
    if made.int8 is not None and made.int8_bytes is not None:
        document["int8"] = str(made.int8)
        lines.append(f"{made.int8}: {made.int8_bytes / 1e6:.1f} MB")
    for name, rate in rates.items():
        document[f"wer_{name}"] = rate
        lines.append(f"WER with {name}: {rate:.2%}")
    emit(document, as_json=as_json, text="\n".join(lines))


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(export)
