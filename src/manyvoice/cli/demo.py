"""``manyvoice demo``: everything once, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from manyvoice.cli.console import Terminal, emit


def demo(
    folder: Annotated[Path, typer.Option(help="Where corpus, run and model go.")] = Path("runs/demo"),
    utterances: Annotated[int, typer.Option(help="Phrases to speak.")] = 1600,
    epochs: Annotated[int, typer.Option(help="Passes over them.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Speak a corpus, train five sizes at once, measure, give two people voices, transcribe. About four minutes.

    Example: manyvoice demo --folder runs/demo
    """
    from manyvoice.recipes.demo import demo as run_demo

    with Terminal() as terminal:
        done = run_demo(folder, utterances=utterances, epochs=epochs, watcher=terminal)
    lines = [f"said   {spoken}\nheard  {heard}\n" for _, spoken, heard in done.heard]
    example = done.heard[0][0]
    lines += [
        f"test WER      {done.wer:.2%}",
        f"sizes         {', '.join(row['size'] for row in done.sizes)}  (manyvoice subnets {done.model} ls)",
        f"voices        {done.voices['kept']} of {done.voices['speakers']} kept, WER {done.voices['wer_before']:.0%} to"
        f" {done.voices['wer_after']:.0%}  (manyvoice voices {done.folder / 'voices' / 'voices'})",
        *_receipt(done.receipt),
        f"corpus        {done.folder / 'speech'}",
        f"model         {done.model}  (README.md there is its card; stock Transformers loads it)",
        f"metrics       {done.folder / 'run' / 'metrics.jsonl'}, TensorBoard in {done.folder / 'run' / 'events'}",
        "seconds       " + ", ".join(f"{name} {took:.0f}" for name, took in done.seconds.items()),
        f"now try       manyvoice transcribe {done.model} {example} --format srt",
        f"              manyvoice subnets {done.model} extract 40 -o phone",
        f"              manyvoice check {done.model}",
    ]
    emit(done.as_dict(), as_json=as_json, text="\n".join(lines))


def _receipt(receipt: dict[str, Any] | None) -> list[str]:
    if receipt is None:
        return []
    base, voice = receipt["base"][:12], receipt["hash"][:12]
    ran = f"{receipt['method']} at {len(receipt['sites_ran'])} sites"
    return [f"receipt       base {base}, voice {receipt['voice']} {voice}, {ran}"]


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(demo)
