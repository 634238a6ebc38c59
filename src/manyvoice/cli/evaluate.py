"""``manyvoice evaluate``: error rates with counts and intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from manyvoice.cli.console import Terminal, emit
from manyvoice.errors import UsageError


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    manifest: Annotated[list[str], typer.Argument(help="Manifests, folders, or hf:name.")],
    normaliser: Annotated[str, typer.Option(help="How texts are made comparable: basic, none, ...")] = "basic",
    beam: Annotated[int, typer.Option(min=1, help="Beam width; 1 is greedy.")] = 1,
    lm: Annotated[Path | None, typer.Option(help="N-gram language model (ARPA); the beam is at least 2 then.")] = None,
    lm_weight: Annotated[float, typer.Option(help="Weight of the language model.")] = 0.5,
    by: Annotated[str | None, typer.Option(help="A table by speaker, label, language, or a field of the rows.")] = None,
    size: Annotated[str | None, typer.Option(help="One of a supernet's sizes, such as 55.")] = None,
    voice: Annotated[str | None, typer.Option(help="A voice file, or a name in the store.")] = None,
    store: Annotated[
        str | None, typer.Option("--voices", help="Store; without --voice each speaker's own, where there is one.")
    ] = None,
    tenant: Annotated[str, typer.Option(help="Whose voices, in the store.")] = "default",
    hypotheses: Annotated[Path | None, typer.Option(help="Write reference and hypothesis of each row here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Measure WER and CER on a manifest.

    Example: manyvoice evaluate runs/mine/model test.jsonl --by speaker
    """
    from manyvoice.data.manifest import open_corpus
    from manyvoice.decode.evaluate import beam_to_texts, group_of
    from manyvoice.decode.evaluate import evaluate as run_evaluation
    from manyvoice.recipes.sizes import load_size
    from manyvoice.recipes.transcribe import build_beam
    from manyvoice.recipes.voiced import serve_speakers

    if hypotheses is not None and hypotheses.exists() and not _is_ours(hypotheses):
        raise UsageError(f"--hypotheses {hypotheses}: is there already and holds something else; name another file")
    corpus = open_corpus(manifest)
    served = None
    if voice is not None or store is not None:
        served = serve_speakers(model, corpus, size=size, voice=voice, store=store, tenant=tenant, by=by or "speaker")
    recogniser = load_size(model, size) if served is None else served.voiced.variant.recogniser
    decoder = None
    if beam > 1 or lm is not None:
        decoder = beam_to_texts(build_beam(recogniser, beam=beam, lm=lm, lm_weight=lm_weight))
    with Terminal() as terminal:
        result = run_evaluation(
            recogniser,
            corpus,
            decoder=decoder,
            normaliser=normaliser,
            owned=None if served is None else served.owned,
            progress=lambda done, n: terminal.progress("evaluating", done, n),
        )
    document: dict[str, Any] = {"model": model, "corpus": corpus.fingerprint, **result.as_dict()}
    lines = [_line("WER", document, "wer", "word_counts"), _line("CER", document, "cer", "character_counts")]
    lines.append(f"loss {result.loss:.3f} nats a token, {result.loss_per_character:.3f} a character")
    if served is not None:
        document["voices"] = served.as_dict()
        lines.append(served.text())
    if by is not None:
        groups = [group_of(u, by) for u in corpus]
        if all(g is None for g in groups):
            raise UsageError(f"--by {by}: no row has it; try speaker, or a field that stands in the manifest")
        rows = result.words.by_group(groups)
        document["groups"] = [row.as_dict() for row in rows]
        lines += [f"  {row.group}: WER {row.counts.rate:.2%} on {row.utterances} utterances" for row in rows]
    if hypotheses is not None:
        result.write_hypotheses(hypotheses)
    emit(document, as_json=as_json, text="\n".join(lines))


def _is_ours(path: Path) -> bool:
    """Whether an earlier run wrote it."""
    try:
        with path.open(encoding="utf-8") as file:
            return set(json.loads(file.readline())) == {"id", "text", "hypothesis"}
    except (OSError, ValueError, TypeError):
        return False


def _line(name: str, found: dict[str, Any], key: str, counts: str) -> str:
    interval = found.get(f"{key}_interval")
    around = f" (95 % interval {interval[0]:.2%} to {interval[1]:.2%})" if interval else ""
    c = found[counts]
    return (
        f"{name} {found[key]:.2%}{around}: {c['substitutions']} substituted, {c['deletions']} deleted, "
        f"{c['insertions']} inserted of {c['reference']}, text normalised as {found['normaliser']!r}"
    )


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(evaluate)
