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
    from manyvoice.decode.evaluate import evaluate
    from manyvoice.export.onnx import export_onnx, onnx_recogniser
    from manyvoice.recipes.sizes import load_size

    recogniser = load_size(model, size)
    with Terminal() as terminal:
        terminal.note("exporting; that takes a minute")
        made = export_onnx(recogniser, output, int8=int8)
        document: dict[str, Any] = {"model": str(made.model), "tokens": str(made.tokens), "parity": made.parity}
        lines = [f"{made.model}: {made.bytes / 1e6:.1f} MB, differs from torch by {made.parity:.1g} at most"]
        if made.int8 is not None and made.int8_bytes is not None:
            document["int8"] = str(made.int8)
            lines.append(f"{made.int8}: {made.int8_bytes / 1e6:.1f} MB")
        if measure is not None:
            corpus = open_corpus(measure)
            arms = {"torch": recogniser, "onnx": onnx_recogniser(made.model, recogniser)}
            if made.int8 is not None:
                arms["int8"] = onnx_recogniser(made.int8, recogniser)
            for name, arm in arms.items():
                found = evaluate(arm, corpus, progress=lambda d, n, name=name: terminal.progress(name, d, n))  # type: ignore[misc]
                document[f"wer_{name}"] = found.words.rate
                lines.append(f"WER with {name}: {found.words.rate:.2%}")
    emit(document, as_json=as_json, text="\n".join(lines))


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(export)
