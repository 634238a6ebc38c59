"""``manyvoice export``: a model, one of its sizes, or a voice, for other programs: with torch and without."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from manyvoice.cli.console import Terminal, emit
from manyvoice.errors import UsageError

FORMS = ("onnx", "folder", "peft")


def export(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    to: Annotated[str, typer.Option(help="onnx, folder (a voice merged), or peft (a lora voice).")] = "onnx",
    size: Annotated[str | None, typer.Option(help="One of a supernet's sizes, such as 55.")] = None,
    voice: Annotated[
        list[Path] | None, typer.Option(help="Voice file; ONNX takes several, of one method and its settings.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; otherwise it is called like the form.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Also with quantised weights.")] = False,
    measure: Annotated[str | None, typer.Option(help="Manifest on which to measure what the files cost.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Write a model for ONNX Runtime and sherpa-onnx, a voice worked into its model, or a voice for PEFT.

    Example: manyvoice export runs/mine/model --size 40 --int8 --measure test.jsonl -o phone/
    Example: manyvoice export runs/mine/model --voice ann.safetensors --voice bob.safetensors -o phone/
    Example: manyvoice export runs/mine/model --to folder --voice ann.safetensors -o ann/
    """
    if to not in FORMS:
        raise UsageError(f"--to {to}: must be one of {', '.join(FORMS)}")
    files, output = voice or [], output or Path(to)
    if to != "onnx" and len(files) != 1:
        raise UsageError(f"--to {to} takes one --voice FILE, but there are {len(files)}; run it once for each voice")
    if to != "onnx" and int8:
        raise UsageError(f"--int8 belongs to --to onnx; leave it out of --to {to}")
    if to == "peft" and (size or measure):
        raise UsageError("--to peft writes a voice, which belongs to the whole model: leave out --size and --measure")
    if to == "onnx":
        _onnx(model, output, files, size=size, int8=int8, measure=measure, as_json=as_json)
        return
    from manyvoice.data.manifest import open_corpus
    from manyvoice.recipes.export import export_merged, export_peft, read_voice

    document: dict[str, Any] = {to: str(output), "voice": str(files[0])}
    text = f"{output}: {files[0]} "
    if to == "peft":
        export_peft(model, output, read_voice(files[0]))
        text += "as PEFT loads it"
    else:
        corpus = None if measure is None else open_corpus(measure)
        with Terminal() as terminal:
            results = export_merged(model, output, read_voice(files[0]), size=size, corpus=corpus, watcher=terminal)
        text += "worked into the model"
        for result in results.values():
            document["wer"] = result["wer"]
            text += f"\nWER: {result['wer']:.2%}"
    emit(document, as_json=as_json, text=text)


def _onnx(
    model: str, output: Path, files: list[Path], *, size: str | None, int8: bool, measure: str | None, as_json: bool
) -> None:
    from manyvoice.data.manifest import open_corpus
    from manyvoice.recipes.export import export as run_export
    from manyvoice.recipes.export import read_voice

    corpus = None if measure is None else open_corpus(measure)
    voices = [read_voice(file) for file in files]
    with Terminal() as terminal:
        made, rates = run_export(
            model, output, size=size, voices=voices, int8=int8, corpus=corpus, watcher=terminal
        )  # fmt: skip
    document: dict[str, Any] = {"model": str(made.model), "tokens": str(made.tokens), "parity": made.parity}
    lines = [f"{made.model}: {made.bytes / 1e6:.1f} MB, differs from torch by {made.parity:.1g} at most"]
    if made.int8 is not None and made.int8_bytes is not None:
        document["int8"] = str(made.int8)
        lines.append(f"{made.int8}: {made.int8_bytes / 1e6:.1f} MB")
        if corpus is None:
            lines.append("what that costs in errors was not measured: --measure MANIFEST does")
    if made.voices:
        document["voices"] = {str(file): str(path) for file, path in zip(files, made.voices, strict=True)}
        lines += [f"{path}: {file}" for file, path in document["voices"].items()]
    for name, rate in rates.items():
        document[f"wer_{name.replace(' ', '_')}"] = rate
        lines.append(f"WER with {name}: {rate:.2%}")
    emit(document, as_json=as_json, text="\n".join(lines))


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(export)
