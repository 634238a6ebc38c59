"""``manyvoice corpus``: make, import, check, describe, join and split corpora."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyvoice.cli.console import Terminal, emit
from manyvoice.errors import CorpusError, UsageError

corpus = typer.Typer(help="Make, import, check and describe corpora.", no_args_is_help=True)

_Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
_Manifest = Annotated[list[str], typer.Argument(help="Manifests, folders, or hf:name.")]
_Overwrite = Annotated[bool, typer.Option(help="Replace what is there.")]


@corpus.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    utterances: Annotated[int, typer.Option("--utterances", "-n", help="How many.")] = 1000,
    speakers: Annotated[int, typer.Option(help="How many voices.")] = 8,
    grammar: Annotated[str, typer.Option(help="digits, commands or sentences.")] = "commands",
    text: Annotated[Path | None, typer.Option(help="Phrases to speak, one a line; implies sentences.")] = None,
    words: Annotated[tuple[int, int], typer.Option(help="Shortest and longest phrase in words.")] = (1, 12),
    vocabulary: Annotated[int | None, typer.Option(help="Only phrases of the N most frequent words.")] = None,
    dialect: Annotated[
        list[str] | None, typer.Option(help="One or more of the dialects; all English ones else.")
    ] = None,
    atypical: Annotated[int, typer.Option(help="How many speakers are simulated atypical ones.")] = 0,
    noise: Annotated[float, typer.Option(help="Probability of noise.")] = 0.0,
    snr: Annotated[tuple[float, float], typer.Option(help="Lowest and highest signal-to-noise ratio in dB.")] = (5, 20),
    room: Annotated[float, typer.Option(help="Probability of a room.")] = 0.0,
    splits: Annotated[str | None, typer.Option(help="As train=0.8,dev=0.1,test=0.1; no phrase is in two.")] = None,
    held_out_speakers: Annotated[bool, typer.Option(help="Splits share no speaker either.")] = False,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal bytes.")] = 0,
    form: Annotated[str, typer.Option("--format", help="flac or wav.")] = "flac",
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    overwrite: _Overwrite = False,
    as_json: _Json = False,
) -> None:
    """Speak a corpus with espeak-ng.

    Example: manyvoice corpus synth data/commands -n 500 --speakers 6
    """
    from manyvoice.data import synth as synthesis
    from manyvoice.data.voices import ENGLISH

    spec = synthesis.SynthSpec(
        utterances=utterances,
        speakers=speakers,
        grammar="sentences" if text is not None else grammar,
        text=text,
        words=words,
        vocabulary=vocabulary,
        dialects=tuple(dialect) if dialect else tuple(ENGLISH),
        atypical=atypical,
        noise=noise,
        snr_db=snr,
        room=room,
        seed=seed,
        format=form,
    )
    with Terminal() as terminal:

        def progress(done: int, total: int) -> None:
            terminal.progress("speaking", done, total)

        if splits is None:
            written = {"all": synthesis.synthesise(spec, out, jobs=jobs, overwrite=overwrite, progress=progress)}
        else:
            written = synthesis.synthesise_splits(
                spec,
                out,
                _shares(splits),
                held_out_speakers=held_out_speakers,
                jobs=jobs,
                overwrite=overwrite,
                progress=progress,
            )
    paths = {name: str(path) for name, path in written.items()}
    emit({"manifests": paths}, as_json=as_json, text="\n".join(paths.values()))


@corpus.command("import")
def import_(
    name: Annotated[str, typer.Argument(help="speechocean762, fsdd, librispeech or kespeech.")],
    folder: Annotated[Path, typer.Argument(help="Your copy of the corpus, as published.")],
    out: Annotated[Path, typer.Argument(help="Folder for the manifests.")],
    overwrite: _Overwrite = False,
    as_json: _Json = False,
) -> None:
    """Write manifests for your own copy of a public corpus.

    Example: manyvoice corpus import librispeech LibriSpeech data/librispeech
    """
    from manyvoice.data.importers import import_corpus

    written = {split: str(p) for split, p in import_corpus(name, folder, out, overwrite=overwrite).items()}
    emit({"manifests": written}, as_json=as_json, text="\n".join(written.values()))


@corpus.command()
def check(
    manifest: _Manifest,
    model: Annotated[str | None, typer.Option(help="Also check labels against this model's frames and tokens.")] = None,
    deep: Annotated[bool, typer.Option(help="Decode every sound, not only its header.")] = False,
    limit: Annotated[int, typer.Option(help="Problems to print.")] = 50,
    as_json: _Json = False,
) -> None:
    """Look for what would spoil a training run; exit status 1 if there is any.

    Example: manyvoice corpus check train.jsonl --deep
    """
    from manyvoice.data.check import check as run_check
    from manyvoice.data.manifest import open_corpus
    from manyvoice.decode.recogniser import Recogniser

    rows = open_corpus(manifest)
    recogniser = Recogniser.load(model) if model is not None else None
    with Terminal() as terminal:
        report = run_check(
            rows,
            tokenizer=recogniser.tokenizer if recogniser else None,
            encoder_frames=recogniser.encoder_frames if recogniser else None,
            deep=deep,
            progress=lambda done, n: terminal.progress("checking", done, n),
        )
    problems = [{"kind": p.kind, "where": p.where, "message": p.message, "warning": p.warning} for p in report.problems]
    text = report.text(limit=limit) if report.problems else f"{len(rows)} utterances, nothing wrong"
    emit({"utterances": len(rows), "counts": dict(report.counts()), "problems": problems}, as_json=as_json, text=text)
    if report.errors():
        raise CorpusError(
            f"{len(report.errors())} rows are bad; mend them, or leave them out with corpus.skip_bad=true"
        )


@corpus.command()
def stats(manifest: _Manifest, as_json: _Json = False) -> None:
    """Hours, speakers, words, and how long utterances are.

    Example: manyvoice corpus stats train.jsonl
    """
    from manyvoice.data.manifest import open_corpus

    found = open_corpus(manifest).stats()
    emit(found.json(), as_json=as_json, text=found.text())


@corpus.command()
def join(
    manifest: _Manifest,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    strings: Annotated[int, typer.Option("--strings", "-n", help="How many.")] = 1000,
    clips: Annotated[tuple[int, int], typer.Option(help="Fewest and most clips in a string.")] = (1, 6),
    seed: Annotated[int, typer.Option(help="Equal seeds give equal strings.")] = 0,
    as_json: _Json = False,
) -> None:
    """Join clips of one speaker into strings, as digits into numbers.

    Example: manyvoice corpus join digits.jsonl data/numbers -n 4000 --clips 1 6
    """
    from manyvoice.data.join import join_clips

    path = join_clips(list(manifest), out, strings=strings, clips=clips, seed=seed)
    emit({"manifest": str(path)}, as_json=as_json, text=str(path))


@corpus.command()
def split(
    manifest: _Manifest,
    out: Annotated[Path, typer.Argument(help="Folder for NAME.jsonl of each part.")],
    shares: Annotated[str, typer.Option(help="Parts and their shares.")] = "train=0.8,dev=0.1,test=0.1",
    by: Annotated[str, typer.Option(help="speaker or utterance.")] = "speaker",
    seed: Annotated[int, typer.Option(help="Equal seeds give equal parts.")] = 0,
    overwrite: _Overwrite = False,
    as_json: _Json = False,
) -> None:
    """Cut a corpus into parts that share no speaker.

    Example: manyvoice corpus split all.jsonl data/parts --shares train=0.9,dev=0.1
    """
    from manyvoice.data.manifest import open_corpus

    parts = open_corpus(manifest).split(by=by, shares=_shares(shares), seed=seed)
    written = {}
    for name, part in parts.items():
        path = out / f"{name}.jsonl"
        part.write(path, overwrite=overwrite)
        written[name] = str(path)
    emit({"manifests": written}, as_json=as_json, text="\n".join(written.values()))


@corpus.command()
def ngram(
    texts: Annotated[list[Path], typer.Argument(help="Text files, one phrase a line, or manifests.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="ARPA file to write.")],
    order: Annotated[int, typer.Option(help="Words in a context, this one included.")] = 3,
    as_json: _Json = False,
) -> None:
    """Count an n-gram language model for `transcribe --lm`; interpolated Witten-Bell.

    Example: manyvoice corpus ngram phrases.txt -o words.arpa
    """
    from manyvoice.data.manifest import open_corpus
    from manyvoice.decode.lm import train_ngram
    from manyvoice.decode.wer import normaliser_named

    lines: list[str] = []
    for path in texts:
        try:
            lines += (
                path.read_text(encoding="utf-8").splitlines() if path.suffix == ".txt" else open_corpus(path).texts()
            )
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"{path}: cannot be read ({error}); give a text file or a manifest") from error
    model = train_ngram(map(normaliser_named("basic"), lines), order)
    model.write_arpa(out)
    emit({"lm": str(out), "order": order, "lines": len(lines)}, as_json=as_json, text=str(out))


def _shares(text: str) -> dict[str, float]:
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError as error:
            raise UsageError(f"shares {text!r}: must look like train=0.8,dev=0.1,test=0.1") from error
    return shares


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    app.add_typer(corpus, name="corpus")
