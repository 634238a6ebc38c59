"""``manyvoice enrol``: a voice for a new speaker of a space, from seconds of speech."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from manyvoice.cli.console import Terminal, emit
from manyvoice.errors import UsageError

_MANIFESTS = (".jsonl", ".json", ".csv", ".tsv", ".gz")


def enrol(
    base: Annotated[str, typer.Argument(help="Model folder or hub id, the base of the space.")],
    speech: Annotated[list[str], typer.Argument(help="One speaker: manifests with texts, or sound files and folders.")],
    space: Annotated[Path, typer.Option(help="Folder that `manyvoice space` wrote.")],
    name: Annotated[str, typer.Option(help="What the voice is called.")],
    store: Annotated[str, typer.Option("--voices", help="Store that keeps it.")],
    tenant: Annotated[str, typer.Option(help="Whose voice it is, in the store.")] = "default",
    how: Annotated[
        Literal["auto", "learn", "predict"],
        typer.Option(help="auto learns if there are texts and predicting does not help."),
    ] = "auto",
    refine: Annotated[
        bool, typer.Option("--refine", help="Then train all of the voice's weights; wants texts, and is not verified.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Let an unverified voice take the place of one that has its name.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Steps of learning, at most.")] = 60,
    licence: Annotated[str | None, typer.Option(help="Of the speech, for the voice's card.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of utterances and their masks.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Give a new speaker a voice: predicted from sound alone, or learned from utterances with texts.

    With two utterances and their texts or more, the voice is compared with the base on speech that it has not learned
    from, and stored only if it is better there. From sound alone, or learned from a single utterance, it is stored
    unverified. What --refine changes comes after the comparison, so a refined voice is stored unverified too.

    A voice takes the place of one that has its name, and the output says which; an unverified one only with --replace.

    Example: manyvoice enrol runs/mine/model ann.wav --space runs/space --name ann --voices runs/voices
    """
    from manyvoice.data.manifest import open_corpus
    from manyvoice.recipes.enrol import Enrolment
    from manyvoice.recipes.enrol import enrol as run_job
    from manyvoice.recipes.space import Learning
    from manyvoice.recipes.transcribe import recordings_of
    from manyvoice.submodels.store import Store

    labelled = [Path(one).suffix.lower() in _MANIFESTS for one in speech]
    if any(labelled) and not all(labelled):
        raise UsageError(f"{' '.join(speech)}: mixes manifests with sound; give manifests with texts, or sound alone")
    wanted = Enrolment(
        how=how, refine=refine, learning=Learning(rounds=rounds, seed=seed), tenant=tenant, licence=licence,
        replace=replace,
    )  # fmt: skip
    heard = open_corpus(speech) if all(labelled) else list(recordings_of(speech))
    with Terminal() as terminal:
        found = run_job(base, space, name, heard, store=Store(store), wanted=wanted, watcher=terminal)
    emit(found.as_dict(), as_json=as_json, text=found.text())


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(enrol)
