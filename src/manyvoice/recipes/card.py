"""Model cards that are written, not typed: ``manyvoice.json`` for machines, ``README.md`` for people, and the check.

``manyvoice check MODEL`` recomputes what a card claims: the weights' fingerprint, that the folder loads, the data's
fingerprints, and every error count.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

import yaml

from manyvoice import __version__
from manyvoice.config import RunConfig
from manyvoice.data.manifest import Corpus, open_corpus
from manyvoice.decode.evaluate import Evaluation, evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.errors import ManyvoiceError, ModelError, UsageError, WorkError
from manyvoice.models.anatomy import parameter_count
from manyvoice.recipes.prepare import Corpora
from manyvoice.recipes.watch import Silent, Watcher

CARD, FORMAT = "manyvoice.json", "card.v1"
_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "sentencepiece", "soundfile")


@final
@dataclass(frozen=True, kw_only=True)
class Data:
    """One corpus that a model saw or was measured on."""

    role: str
    manifest: str
    fingerprint: str
    utterances: int
    hours: float
    speakers: int
    licence: str | None

    @classmethod
    def of(cls, role: str, spec: object, corpus: Corpus, licence: str | None) -> Data:
        """What a card says about a corpus."""
        return cls(
            role=role,
            manifest=spec if isinstance(spec, str) else json.dumps(spec),
            fingerprint=corpus.fingerprint,
            utterances=len(corpus),
            hours=round(float(corpus.durations_N.sum()) / 3600, 4),
            speakers=len(corpus.speakers()),
            licence=licence,
        )


@final
@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a model comes from: data, settings, command, seed, versions, base, and which checkpoint it is."""

    data: tuple[Data, ...]
    run: dict[str, Any]
    command: str | None
    seed: int
    base: str | None
    checkpoint: str
    versions: dict[str, str]

    @classmethod
    def of(cls, run: RunConfig, corpora: Corpora, checkpoint: str, command: str | None) -> Provenance:
        """Of a training run that has just ended."""
        said = run.corpus
        licence = said.licence
        data = [
            Data.of("train", said.train, corpora.train, licence),
            Data.of("dev", said.dev or str(Path(run.output) / "dev.jsonl"), corpora.dev, licence),
        ]
        if corpora.test is not None:
            data.append(Data.of("test", said.test, corpora.test, licence))
        return cls(
            data=tuple(data),
            run=run.model_dump(mode="json"),
            command=command,
            seed=run.seed,
            base=run.model.base,
            checkpoint=checkpoint,
            versions=versions(),
        )


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    found = {"python": platform.python_version(), "manyvoice": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_card(
    folder: Path, recogniser: Recogniser, provenance: Provenance, corpora: Corpora, watcher: Watcher | None = None
) -> dict[str, Any]:
    """Measure the saved model on dev and test and write both files; returns what ``manyvoice.json`` holds.

    Raises: WorkError if the files cannot be written; then neither is there in part.
    """
    watcher = watcher or Silent()
    saved = Recogniser.load(folder, device=str(recogniser.device))
    results = measured(saved, {"dev": corpora.dev, "test": corpora.test}, watcher, "measuring on")
    return _finish(folder, saved, asdict(provenance), results, folder.parent.name)


def write_derived_card(
    folder: Path, recogniser: Recogniser, card: Mapping[str, Any], *, results: Mapping[str, Any], command: str
) -> dict[str, Any]:
    """The card of a model made from another one, whose provenance it shares; returns it."""
    shared = {k: v for k, v in card.items() if k not in ("format", "fingerprint", "family", "parameters", "results")}
    shared |= {"command": command, "made_from": card["fingerprint"]}
    return _finish(folder, recogniser, shared, results, folder.name)


def measured(
    recogniser: Recogniser, corpora: Mapping[str, Corpus | None], watcher: Watcher, stage: str
) -> dict[str, dict[str, Any]]:
    """Results on the corpora that there are, as a card keeps them."""
    return {
        role: {"corpus": corpus.fingerprint, **_evaluate(recogniser, corpus, watcher, f"{stage} {role}").as_dict()}
        for role, corpus in corpora.items()
        if corpus is not None
    }


def _finish(
    folder: Path, recogniser: Recogniser, provenance: Mapping[str, Any], results: Mapping[str, Any], name: str
) -> dict[str, Any]:
    card = {
        "format": FORMAT,
        "fingerprint": recogniser.fingerprint(),
        "family": recogniser.family.name,
        "parameters": parameter_count(recogniser.model),
        **provenance,
        "results": results,
    }
    _write(folder / "README.md", _readme(card, name))
    # last: who finds it finds all that belongs to the model
    _write(folder / CARD, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    return card


def _write(path: Path, text: str) -> None:
    """A file that is whole whenever it is there."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise WorkError(
            f"{path}: cannot be written ({error}); the model beside it is whole and its checkpoints are kept; free "
            "space or make the folder writable, then run the same command again"
        ) from error


def read_card(folder: Path) -> dict[str, Any]:
    """``manyvoice.json`` of a model folder. ModelError if it has none or it is damaged."""
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such folder; give the folder of a model") from error
        inner = folder / "model"
        way_out = f"; give {inner}, which has one" if (inner / CARD).is_file() else ""
        raise ModelError(f"{folder} holds no {CARD}: nothing says where this model comes from{way_out}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ModelError(f"{path}: this version reads {FORMAT!r}; write the card again with a matching version")
    return card


@final
@dataclass(frozen=True)
class Check:
    """One claim of a card: ``holds`` is None where it could not be tried, and ``found`` says why."""

    claim: str
    holds: bool | None
    found: str


def check_model(
    folder: Path, *, data: Mapping[str, str] | None = None, watcher: Watcher | None = None
) -> tuple[Check, ...]:
    """Recompute what a model's card claims.

    Args: data: manifest of a role (``dev``, ``test``), where it is no longer where the card says.
    Raises: ModelError if there is no card or the model does not load; UsageError for a role without results.
    """
    watcher = watcher or Silent()
    card = read_card(folder)
    for role, place in (data or {}).items():
        if role not in card["results"]:
            known = ", ".join(card["results"]) or "nothing"
            raise UsageError(f"--data {role}={place}: must name a role that the card has results on, which are {known}")
    recogniser = Recogniser.load(folder)
    fingerprint = recogniser.fingerprint()
    checks = [
        Check("weights are those the card was written for", fingerprint == card["fingerprint"], fingerprint),
        Check("parameters", parameter_count(recogniser.model) == card["parameters"], str(card["parameters"])),
        Check("command is recorded", card["command"] is not None, card["command"] or "trained from Python"),
    ]
    for entry in card["data"]:
        said = entry["licence"]
        checks.append(Check(f"licence of {entry['role']} data is stated", said is not None, said or "none is"))
    places = {entry["role"]: entry["manifest"] for entry in card["data"]} | dict(data or {})
    for role, claimed in card["results"].items():
        checks += _check_result(recogniser, role, claimed, places.get(role, ""), watcher)
    return tuple(checks)


def _check_result(
    recogniser: Recogniser, role: str, claimed: Mapping[str, Any], place: str, watcher: Watcher
) -> list[Check]:
    claim = f"{role}: WER {claimed['wer']:.2%}"
    try:
        corpus = open_corpus(json.loads(place) if place.startswith("[") else place)
        same = corpus.fingerprint == claimed["corpus"]
        if not same:
            return [Check(claim, None, f"{place} is not the corpus that was measured; give it with --data {role}=...")]
        found = _evaluate(recogniser, corpus, watcher, f"measuring on {role}")
    except ManyvoiceError as error:
        return [Check(claim, None, f"{error}; give the corpus with --data {role}=...")]
    counts, said = found.words.total.as_dict(), claimed["word_counts"]
    return [Check(claim, counts == said, f"WER {found.words.rate:.2%}")]


def _evaluate(recogniser: Recogniser, corpus: Corpus, watcher: Watcher, stage: str) -> Evaluation:
    return evaluate(recogniser, corpus, progress=partial(watcher.progress, stage))


def _readme(card: Mapping[str, Any], name: str) -> str:
    """The card for people, with the head that the Hugging Face hub reads."""
    licences = sorted({d["licence"] for d in card["data"] if d["licence"]})
    head = {
        "library_name": "transformers",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["manyvoice", card["family"]],
    }
    train = next(d for d in card["data"] if d["role"] == "train")
    rows = [
        f"| {d['role']} | `{d['manifest']}` | {d['utterances']} | {d['hours']:.2f} | {d['speakers']} | "
        f"{d['licence'] or 'not stated'} | `{d['fingerprint'][:12]}` |"
        for d in card["data"]
    ]
    results = [
        f"| {role} | {_rate(r, 'wer')} | {_rate(r, 'cer')} | {r['loss_per_character']:.3f} | {r['utterances']} |"
        for role, r in card["results"].items()
    ]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        f"# {name}",
        "",
        f"A {card['family']} recogniser of {card['parameters'] / 1e6:.1f} M parameters, trained on "
        f"{train['hours']:.2f} hours of {train['speakers'] or 'unnamed'} speakers by manyvoice "
        f"{card['versions'].get('manyvoice', '')}.",
        "",
        "| data | manifest | utterances | hours | speakers | licence | fingerprint |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "| measured on | WER | CER | nats per character | utterances |",
        "|---|---|---|---|---|",
        *results,
        "",
        f"Error rates with 95 % bootstrap intervals over utterances, text normalised as `{_normaliser(card)}`.",
        "",
        f"- licences of the data: {', '.join(licences) or 'not stated'}",
        f"- base: {card['base'] or 'none, trained from nothing'}",
        f"- checkpoint: {card['checkpoint']}; seed {card['seed']}",
        f"- command: `{card['command'] or 'from Python'}`",
        f"- weights: sha256 `{card['fingerprint']}`",
        f"- versions: {', '.join(f'{k} {v}' for k, v in card['versions'].items())}",
        "",
        "`manyvoice check` on this folder recomputes these figures. All settings are in `manyvoice.json`.",
        "",
    ]
    return "\n".join(lines)


def _rate(result: Mapping[str, Any], name: str) -> str:
    interval = result.get(f"{name}_interval")
    around = f" ({interval[0]:.2%} to {interval[1]:.2%})" if interval else ""
    return f"{result[name]:.2%}{around}"


def _normaliser(card: Mapping[str, Any]) -> str:
    return next((r["normaliser"] for r in card["results"].values()), "none")
