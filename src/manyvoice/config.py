"""Run files: YAML and ``a.b=c`` overrides to validated settings, every mistake reported at once.

A run file says what is different from the defaults below; ``run.yaml`` in the run's folder says all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manyvoice.errors import ConfigError, Mistake, UsageError

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Manifests = str | list[str]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class CorpusConfig(_Section):
    """What is trained on, what chooses, and what reports.

    Args: train, dev, test: a manifest, a folder, ``hf:name``, or a list of them.  dev_share: where there is no
        ``dev``, this share of the training hours is kept for it: whole speakers where there are enough, otherwise
        utterances.  skip_bad: leave bad rows out, counted and listed.  cache: keep features on disk, or decoded sound
        where augmentation changes it: in the run's folder, or in one that is named here and that runs share.
        licence: of the data, for the model card.
    """

    train: Manifests
    dev: Manifests | None = None
    test: Manifests | None = None
    dev_share: Share = 0.1
    skip_bad: bool = False
    cache: bool | Annotated[str, Field(min_length=1)] = True
    licence: str | None = None


class TokenizerConfig(_Section):
    """Label units, learned from the training text unless the model brings its own."""

    kind: Literal["words", "characters", "sentencepiece"] = "sentencepiece"
    size: Positive = 256
    normalise: bool = True


class ModelConfig(_Section):
    """A preset with changes, or a model to start from: a folder or a hub id.

    Args: new_vocabulary: keep the base's encoder only; the tokenizer is learned from the corpus, the head is new.
        freeze_batchnorm: without a value, statistics rest where a base is tuned with its own vocabulary.
    """

    preset: str | None = "tiny"
    base: str | None = None
    settings: dict[str, Any] = {}
    new_vocabulary: bool = False
    freeze_batchnorm: bool | None = None


class AugmentConfig(_Section):
    """What is done to training audio; see ``manyvoice.data.augment``."""

    speed: list[float] = []
    noise: Share = 0.0
    snr_db: tuple[float, float] = (10.0, 30.0)
    volume_db: Annotated[float, Field(ge=0.0, le=60.0)] = 0.0
    freq_masks: Annotated[int, Field(ge=0)] = 2
    freq_width: Annotated[int, Field(ge=0)] = 15
    time_masks: Annotated[int, Field(ge=0)] = 2
    time_share: Share = 0.05


class BatchConfig(_Section):
    """Batches of like shape, as large as memory holds; ``accumulate`` of them make a step.

    Args:
        memory: that training may take, such as ``8GiB``. Without it a CPU gives half of what is free, and a GPU
            ``fraction`` of all it has. How many utterances fit is measured once and remembered.
        updates: an epoch has at least so many steps where the corpus allows: larger batches make fewer.
        least: padded seconds below which batches do not go for the sake of ``updates``: single utterances train slowly.
        seconds: padded audio of a batch, instead of measuring.
        bins, token_bins: of the duration axis, by the size of the corpus unless given; and of the tokens in each.
        layout: batches are of one bin, or of neighbours in the (duration, tokens) plane.
        strict: an utterance with more tokens than its duration's bins have room for is a bad row, instead of being
            batched with longer ones.
    """

    memory: str | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    updates: Annotated[int, Field(ge=0)] = 200
    least: Annotated[float, Field(ge=0)] = 10.0
    seconds: Annotated[float, Field(gt=0)] | None = None
    bins: Positive | None = None
    token_bins: Positive = 2
    layout: Literal["neighbourhood", "bins"] = "neighbourhood"
    strict: bool = False
    accumulate: Positive = 1


class OptimizerConfig(_Section):
    """How weights move.

    Args: name: without a value ScaledAdam for a new model, AdamW for a base that is tuned.
        lr, weight_decay: without a value 0.02 and 0 for ScaledAdam, 4e-4 and 0.01 for AdamW.
        warmup: share of all steps.  clip: of the gradient's norm; ScaledAdam clips by a rule of its own.
    """

    name: Literal["adamw", "scaledadam"] | None = None
    lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    schedule: Literal["onecycle", "eden", "inverse-sqrt", "constant"] = "onecycle"
    warmup: Share = 0.1
    clip: Annotated[float, Field(gt=0)] | None = 1.0


# The share that `bench supernet` measured, 1,588 of 5,294 steps; others are untried.
GROW = 0.3


class ElasticConfig(_Section):
    """One run for many sizes: with this section the model is trained as a supernet, and its sizes come out beside it.

    Args:
        sizes: shares of the largest model's multiply-accumulates in the encoder's layers, 1 among them.
        grow: share of the steps, at the beginning, that train the smallest alone; the others grow from what it has
            learned by then. 0.3 for a new model and 0 for a base, where the run does not say.
        others: subnets that a step trains beside the largest; with 1, in turn the smallest and a random one.
        named: share of random draws that are one of the sizes; the others are any uniform subnet between them.
        distill: what the others learn from the largest of the same step: KL, adaptive alpha-divergence, or nothing.
        hard: share of the labels in what they learn from.
        weight: of each of the others' losses beside the largest's.
        dropout: rates follow the kept width.
        sandwich: without it a step trains one size alone.
    """

    sizes: list[Annotated[float, Field(gt=0, le=1)]] = [1.0, 0.75, 0.55, 0.4, 0.25]
    grow: Annotated[float, Field(ge=0, lt=1)] | None = None
    others: Positive = 2
    named: Share = 1.0
    distill: Literal["alpha", "kl", "none"] = "none"
    hard: Share = 0.5
    weight: Annotated[float, Field(gt=0, le=10)] = 1.0
    dropout: bool = True
    sandwich: bool = True


class TrainConfig(_Section):
    """How long, how precise, and what is kept. ``every`` counts steps; 0 is once an epoch.

    Args: flat_start: until the model says half of an utterance's labels, expect them evenly spread over its frames.
    """

    epochs: Positive = 20
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    flat_start: bool = True
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    keep_last: Positive = 2
    keep_best: Positive = 1
    average: Annotated[int, Field(ge=1)] = 1
    activation_checkpointing: bool = False
    workers: Annotated[int, Field(ge=0)] = 0
    threads: Annotated[int, Field(ge=0)] = 0


class RunConfig(_Section):
    """One training run; ``output`` is the folder it writes."""

    output: str
    seed: Annotated[int, Field(ge=0)] = 0
    corpus: CorpusConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    elastic: ElasticConfig | None = None
    train: TrainConfig = TrainConfig()

    @property
    def optimizer_name(self) -> Literal["adamw", "scaledadam"]:
        """The run's, or where it does not say ScaledAdam for a new model, AdamW for a base."""
        return self.optimizer.name or ("scaledadam" if self.model.base is None else "adamw")

    @property
    def grow(self) -> float:
        """Share of a supernet's steps that train its smallest size alone; a base has learned what that could teach."""
        if self.elastic is None or not self.elastic.sandwich:
            return 0.0
        if self.elastic.grow is None:
            return GROW if self.model.base is None else 0.0
        return self.elastic.grow

    def fingerprint(self) -> str:
        """sha256 of :meth:`decisive`; equal runs give equal models."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()

    def decisive(self) -> dict[str, Any]:
        """Everything but ``output`` and how the work is spread."""
        settings = self.model_dump(mode="json")
        settings.pop("output")
        for name in ("workers", "threads"):
            settings["train"].pop(name)
        for name in ("memory", "fraction"):  # a run may go on where there is less of it
            settings["batch"].pop(name)
        settings["corpus"]["cache"] = bool(self.corpus.cache)  # not where
        if self.elastic is None:
            settings.pop("elastic")
        return settings

    def to_yaml(self) -> str:
        """All settings, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run file with overrides applied.

    Paths in it are relative to the folder the command is given in, as on a command line.
    Raises: ConfigError that lists every mistake; UsageError for a file that is no YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"run file {path}: cannot be read ({error}); give the path of a YAML file") from error
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = str(error).replace("\n", " ")
        raise UsageError(f"run file {path}: not YAML ({place}); check indentation and colons there") from error
    if not isinstance(settings, dict):
        raise UsageError(f"run file {path}: must be a mapping such as `output: runs/mine`, but is {settings!r:.80}")
    return make_run(settings, overrides, where=f"run file {path}")


def make_run(settings: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "run") -> RunConfig:
    """Validated settings from a nested mapping and ``a.b=c`` overrides. ConfigError lists every mistake."""
    try:
        nested: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{where}: must be plain values under names ({error}); write it as in docs/training.md"
        ) from None
    mistakes = [m for o in overrides if (m := _override(nested, o)) is not None]
    try:
        run = RunConfig.model_validate(nested)
    except ValidationError as error:
        mistakes += [_mistake(e) for e in error.errors()]
        raise ConfigError(where, mistakes) from None
    mistakes += _across(run)
    if mistakes:
        raise ConfigError(where, mistakes)
    return run


def _override(nested: dict[str, Any], override: str) -> Mistake | None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        return Mistake("override", override, "must look like a.b=c", "for example train.epochs=5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return Mistake(path, text, "is not a YAML value", "quote it")
    for key in keys[:-1]:
        nested = nested.setdefault(key, {})
        if not isinstance(nested, dict):
            return Mistake(path, text, f"{key} is a value, not a section", "set it as a whole")
    nested[keys[-1]] = value
    return None


def _mistake(error: Any) -> Mistake:
    """One of pydantic's errors in our words."""
    parts = [str(p) for p in error["loc"]]
    # pydantic names the branch of a union in the location; users never wrote it
    field = ".".join(
        p for p in parts if not p.startswith(("list[", "constrained", "function-")) and p not in ("str", "bool")
    )
    if error["type"] == "extra_forbidden":
        names = _fields_at(parts[:-1])
        close = get_close_matches(parts[-1], names, n=1)
        way = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
        return Mistake(field, error["input"], "no such setting", way)
    if error["type"] == "missing":
        return Mistake(field, None, "must be given", f"add `{field}: ...` to the run file")
    context = error.get("ctx", {})
    way = f"give {context['expected']}" if "expected" in context else "change the value"
    return Mistake(field, error["input"], error["msg"][:1].lower() + error["msg"][1:], way)


def _fields_at(parts: Sequence[str]) -> list[str]:
    section: Any = RunConfig
    for part in parts:
        field = section.model_fields.get(part)
        kinds = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if section is None:
            return []
    return sorted(section.model_fields)


# ScaledAdam's rates are relative to a tensor's size: some 25 to 100 times AdamW's.
_LIKELY: Mapping[str, Callable[[float], bool]] = {"scaledadam": lambda lr: lr >= 2e-3, "adamw": lambda lr: lr < 5e-3}


def _across(run: RunConfig) -> list[Mistake]:
    """Rules that join two settings."""
    mistakes = []
    if run.model.preset is None and run.model.base is None:
        mistakes.append(Mistake("model", None, "needs a preset or a base", "set model.preset: tiny"))
    if run.model.base is not None and run.model.settings:
        mistakes.append(
            Mistake("model.settings", run.model.settings, "cannot change the shape of a base", "drop one of the two")
        )
    lr = run.optimizer.lr
    if lr is not None and run.optimizer.name is None and not _LIKELY[run.optimizer_name](lr):
        meant = "adamw" if run.model.base is None else "scaledadam"
        mistakes.append(
            Mistake("optimizer.lr", lr, f"is no rate for {run.optimizer_name}, the optimiser where none is named",
                    f"set optimizer.name={meant} if that is meant, or else optimizer.name={run.optimizer_name}")
        )  # fmt: skip
    if run.model.base is None and run.model.new_vocabulary:
        mistakes.append(Mistake("model.new_vocabulary", True, "is for a base", "set model.base, or drop it"))
    if run.elastic is not None and (len(set(run.elastic.sizes)) < 2 or 1.0 not in run.elastic.sizes):
        mistakes.append(
            Mistake("elastic.sizes", run.elastic.sizes, "must be 1 and smaller shares", "give [1.0, 0.5, 0.25]")
        )
    if run.elastic is not None and run.elastic.grow and not run.elastic.sandwich:
        mistakes.append(
            Mistake(
                "elastic.grow", run.elastic.grow, "is for the sandwich rule", "drop it, or set elastic.sandwich=true"
            )
        )
    low, high = run.augment.snr_db
    if low > high:
        mistakes.append(Mistake("augment.snr_db", [low, high], "must be low, high", f"give [{high}, {low}]"))
    if run.train.average > run.train.keep_last:
        mistakes.append(
            Mistake(
                "train.average",
                run.train.average,
                f"averages more checkpoints than train.keep_last = {run.train.keep_last} keeps",
                f"set train.keep_last={run.train.average}",
            )
        )
    return mistakes
