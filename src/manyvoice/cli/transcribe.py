"""``manyvoice transcribe``: sound files, folders or manifests to text, JSON lines, SRT or VTT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from manyvoice.cli.console import Terminal
from manyvoice.errors import UsageError, WorkError


def transcribe(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    sources: Annotated[list[Path], typer.Argument(help="Sound files, folders of them, or manifests.")],
    form: Annotated[str, typer.Option("--format", "-f", help="text, jsonl, srt or vtt.")] = "text",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A .jsonl file, or a folder for one file a recording; resumes with the same weights."
        ),
    ] = None,
    longest: Annotated[float, typer.Option(help="Seconds; longer recordings are cut at pauses.")] = 30.0,
    beam: Annotated[int, typer.Option(min=1, help="Beam width; 1 is greedy.")] = 1,
    lm: Annotated[Path | None, typer.Option(help="N-gram language model (ARPA); the beam is at least 2 then.")] = None,
    lm_weight: Annotated[float, typer.Option(help="Weight of the language model.")] = 0.5,
    hotword: Annotated[
        list[str] | None,
        typer.Option(help="A word or phrase to favour, as text or text=bonus; the beam is at least 2."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="One of a supernet's sizes, such as 55.")] = None,
    voice: Annotated[str | None, typer.Option(help="A voice file, or a name in the store.")] = None,
    store: Annotated[str | None, typer.Option("--voices", help="Store of voices that --voice names one of.")] = None,
    tenant: Annotated[str, typer.Option(help="Whose voices, in the store.")] = "default",
    skip_bad: Annotated[bool, typer.Option(help="Leave unreadable sounds out, listed and counted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Turn speech into text.

    Example: manyvoice transcribe runs/mine/model talk.wav --format srt
    """
    from manyvoice.recipes import transcribe as recipe
    from manyvoice.recipes.sizes import load_size
    from manyvoice.recipes.voiced import Voiced, load_bare, load_voiced, with_receipts
    from manyvoice.types import Seconds

    wanted = recipe.form_named(form)
    if not longest > 0:
        raise UsageError(f"--longest = {longest}: must be seconds above 0; 30 is usual")
    if store is not None and voice is None:
        raise UsageError(f"--voices {store}: say whose with --voice NAME; `manyvoice voices {store} ls` lists them")
    voiced: Voiced | None = None
    name: str | None = None
    if voice is not None:
        voiced, name = load_voiced(model, size=size, voice=voice, store=store, tenant=tenant)
    elif output is not None or as_json or wanted == "jsonl":
        voiced = load_bare(model, size=size, tenant=tenant)
    # words on the screen alone have no receipt to show, so nobody waits for the sum over the weights
    recogniser = load_size(model, size) if voiced is None else voiced.recogniser(name)
    kept = None
    if output is not None and voiced is not None:
        kept = recipe.Output(path=output, form=wanted, weights=voiced.weights(name))
    decoder = None
    if beam > 1 or lm is not None or hotword:
        decoder = recipe.build_beam(recogniser, beam=beam, lm=lm, lm_weight=lm_weight, hotwords=hotword or [])
    bad: list[str] = []

    def on_error(recording: recipe.Recording, error: Exception) -> None:
        bad.append(f"{recording.id}: {error}")
        terminal.note(f"left out: {error}")

    with Terminal() as terminal:
        work = recipe.recordings_of(sources)
        if kept is not None:
            work = kept.pending(work)
        transcripts = recipe.transcribe_all(
            recogniser, work, longest=Seconds(longest), beam=decoder, on_error=on_error if skip_bad else None
        )
        if voiced is not None:
            transcripts = with_receipts(voiced, transcripts)
        written = recipe.write_all(transcripts, sys.stdout, kept, wanted, as_json=as_json)
        if output is not None:
            terminal.note(f"{written} recordings transcribed into {output}")
    if bad:
        raise WorkError(f"{len(bad)} recordings could not be read and were left out; the others are done")


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(transcribe)
