"""A whole training run: one folder from a run file, resumed by the same command after whatever ended it.

output/run.yaml        all settings              output/checkpoints/   safetensors and JSON
output/metrics.jsonl   a line a step             output/model/         the model, loadable by stock Transformers
output/events/         TensorBoard               output/cache/         features
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from manyvoice.config import RunConfig, make_run, read_run
from manyvoice.data.plan import Plan, check_ranks
from manyvoice.decode.evaluate import Evaluation, evaluate
from manyvoice.decode.recogniser import Recogniser
from manyvoice.elastic.subnet import Subnet
from manyvoice.errors import CheckpointError, UsageError, WorkError
from manyvoice.models import batchnorm
from manyvoice.recipes.card import CARD, Provenance, write_card
from manyvoice.recipes.prepare import feed, prepare, unaugmented
from manyvoice.recipes.ready import learning_rate, make_optimizer, passes_of, ready, what_null_means
from manyvoice.recipes.sizes import save_sizes
from manyvoice.recipes.sizing import Sizer, limit_of
from manyvoice.recipes.watch import Silent, Watcher
from manyvoice.train import distributed
from manyvoice.train.accounting import Leftovers, large_blocks_apart
from manyvoice.train.checkpoint import Keeper, Kept, Loaded, average, load
from manyvoice.train.durable import place
from manyvoice.train.interrupt import Interrupt
from manyvoice.train.limits import Limits, Version
from manyvoice.train.loop import fit
from manyvoice.train.metrics import MetricsLog, Pace
from manyvoice.train.packing import pack_optimizer, pack_random, unpack_optimizer, unpack_random
from manyvoice.train.sandwich import SupernetPasses
from manyvoice.train.schedule import Schedule, build_schedule
from manyvoice.train.step import Place, PlainStep

# What a run's folder holds before its batches are planned: its settings, and a split of its speech.
_UNPLANNED = ("run.yaml", "run.yaml.tmp", "train.jsonl", "dev.jsonl")


def train(
    run: RunConfig | Path | str,
    *,
    overrides: tuple[str, ...] = (),
    watcher: Watcher | None = None,
    command: str | None = None,
    resume_from: str | None = None,
) -> Path:
    """Train as the run says, or go on where it stopped; returns the model's folder.

    Args:
        run: settings, or the path of a run file.  overrides: ``a.b=c`` for a file.
        command: what was typed, for the model card.
        resume_from: name of a checkpoint such as ``step-00000900``, when the newest is damaged.
    Raises: ConfigError, CorpusError, CheckpointError, WorkError; nothing that was written before is lost.
    """
    config = run if isinstance(run, RunConfig) else read_run(Path(run), overrides)
    if isinstance(run, RunConfig) and overrides:
        config = make_run(run.model_dump(mode="json"), overrides)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    accelerator = distributed.start(config.train.precision)
    check_ranks(config.batch.accumulate, accelerator.num_processes)
    quiet: Watcher = Silent()
    job = Training(config, accelerator, (watcher or quiet) if accelerator.is_main_process else quiet, command)
    return job.run(resume_from)


@final
class Training:
    """One run's parts and the order in which they act. Use :func:`train`."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, watcher: Watcher, command: str | None) -> None:
        self.config, self.accelerator, self.watcher, self.command = config, accelerator, watcher, command
        self.output = Path(config.output)
        self.main = accelerator.is_main_process
        if self.main:
            claim_folder(config)
        accelerator.wait_for_everyone()
        self.sizer = Sizer(config, accelerator, watcher)
        keep = config.train
        self.keeper = Keeper(self.output / "checkpoints", last=keep.keep_last, best=keep.keep_best, writer=self.main)

    def run(self, resume_from: str | None) -> Path:
        """Prepare, fit, choose, save."""
        torch.manual_seed(self.config.seed)
        kept = self._checkpoint(resume_from)
        # the tokenizer and the untrained model of a run that is resumed come from its own folder
        start = self.output / "start"
        before = Recogniser.load(start) if kept is not None and start.is_dir() else None
        loaded = None if kept is None else load(kept.path)

        def accept(plan: Plan) -> None:
            if loaded is not None and loaded.state["plan"] != plan.fingerprint:
                raise CheckpointError(
                    f"{self.keeper.folder} was written for other training data or other batches; put the manifests "
                    f"back as they were, or start afresh in another output folder"
                )

        # the first process writes caches and manifests, the others then find them
        with self.accelerator.main_process_first():
            self.prepared = prepare(
                self.config, self.watcher, recogniser=before, measure=self.sizer, accept=accept, keep=self.main
            )
        if self.main and before is None:
            _save_aside(self.prepared.recogniser, start)
        self.place = Place(steps_of=self.prepared.plan.steps)
        step = self._build_step()
        if loaded is not None:
            self._restore(loaded)
        self._fit(step)
        return self._finish()

    def _checkpoint(self, name: str | None) -> Kept | None:
        if name is None:
            return self.keeper.newest()
        for kept in self.keeper.list():
            if kept.path.name == name:
                return kept
        known = ", ".join(k.path.name for k in self.keeper.list()) or "none"
        raise UsageError(f"{self.keeper.folder} has no sound checkpoint {name!r}; it has {known}")

    def _build_step(self) -> PlainStep:
        self.model = self.prepared.recogniser.model
        self.frozen = ready(self.model, self.config, self.accelerator)
        self.optimizer = make_optimizer(self.model, self.config)
        self.limits = Limits(self._tell_version)
        self.passes = passes_of(self.model, self.config, self._steps())
        step = PlainStep(
            self.model,
            self.passes,
            self.optimizer,
            self._schedule(learning_rate(self.config)),
            self.accelerator,
            clip=self.config.optimizer.clip,
            seed=self.config.seed,
            limits=self.limits,
        )
        if isinstance(self.passes, SupernetPasses):
            step.around_update = self.passes.around_update(self.optimizer)
        return step

    def _tell_version(self, version: Version) -> None:
        seconds, tokens = self.prepared.plan.bins.cells[version.cell]
        self.watcher.note(
            f"out of memory at step {version.from_step} ({version.batch or 'on another rank'}): from now on at most "
            f"{version.size} utterances of the bin up to {seconds:.2f} s and {tokens} tokens run at once; its steps "
            f"stay what they are (plan version {len(self.limits.versions)})"
        )

    def _steps(self) -> int:
        return self.config.train.epochs * self.prepared.plan.steps(0)

    def _schedule(self, lr: float) -> Schedule:
        total = self._steps()
        warmup = round(self.config.optimizer.warmup * total)
        return build_schedule(
            self.config.optimizer.schedule,
            lr=lr,
            total_steps=total,
            warmup_steps=warmup,
            # icefall's constants suit runs of 10^5 steps; a shorter one decays over its own length
            eden_steps=min(7500.0, max(1.0, total / 4)),
            eden_epochs=min(3.5, max(1.0, self.config.train.epochs / 4)),
        )

    def _fit(self, step: PlainStep) -> None:
        settings = self.config.train
        if self.place.epoch >= settings.epochs:
            return
        pace = Pace(settings.epochs)
        within = self._within_memory()
        log_file = MetricsLog(self.output, resume_at=self.place.step) if self.main else nullcontext()
        with Interrupt() as interrupt, log_file as metrics:
            for log in fit(step, self._batches, self.place, epochs=settings.epochs):
                within()
                line: dict[str, Any] = pace.line(log)
                if self.limits.versions:
                    line["plan_version"] = len(self.limits.versions)
                stopped = distributed.any_rank(self.accelerator, interrupt.asked is not None)
                due = self._due(settings.evaluate_every) or self.place.epoch >= settings.epochs
                if due:
                    line |= self._evaluate()
                if metrics is not None:
                    metrics.write(line)
                    growing = self._growing(self.place.step) is not None
                    if not growing and self._growing(self.place.step - 1) is not None:
                        pace.restart()
                    # steps of all sizes take several times as long as those of the smallest
                    self.watcher.step(line, settings.epochs, None if growing else pace.left(line["epoch"]))
                if due or stopped or self._due(settings.checkpoint_every):
                    # while the smallest size trains alone the model itself is no candidate
                    self._save(
                        None if "dev_size" in line else line.get("dev_wer"),
                        passing=not due and not self._due(settings.checkpoint_every),
                    )
                    pace.pause()
                if stopped:
                    raise WorkError(
                        f"stopped by {interrupt.asked or 'another rank'} after step {self.place.step}; a checkpoint is "
                        f"written, and the same command goes on from there"
                    )

    def _within_memory(self) -> Callable[[], None]:
        """On a CPU, what gives back what a step leaves behind; called after each."""
        if self.accelerator.device.type == "cuda":
            return lambda: None
        large_blocks_apart()
        return Leftovers(limit_of(self.config))

    def _due(self, every: int) -> bool:
        """Whether something that happens every so many steps, or with 0 every epoch, happens now."""
        return self.place.index == 0 if every == 0 else self.place.step % every == 0

    def _batches(self, epoch: int, start: int) -> Iterator[list[Any]]:
        return feed(
            self.prepared,
            epoch,
            start,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            workers=self.config.train.workers,
        )

    def _evaluate(self) -> dict[str, Any]:
        """Dev scores; the main process works and the others wait."""
        found: dict[str, Any] = {}
        if self.main:
            with self._as_trained() as size:
                result = self._on_dev()
            found = {"dev_size": size} if size else {}
            found |= {
                "dev_wer": result.words.rate,
                "dev_cer": result.characters.rate,
                "dev_loss": result.loss,
                "dev_loss_per_character": result.loss_per_character,
            }
        self.accelerator.wait_for_everyone()
        return found

    @contextmanager
    def _as_trained(self) -> Iterator[str | None]:
        """The model as the last step trained it: whole, or while it grows its smallest size, by name."""
        passes, size = self.passes, self._growing(self.place.step - 1)
        with passes.elastic.at(size) if isinstance(passes, SupernetPasses) and size is not None else nullcontext():
            yield None if size is None else size.name

    def _growing(self, step: int) -> Subnet | None:
        """The size that a supernet's step trains alone; None for steps of the whole model."""
        return self.passes.grown_from(step) if isinstance(self.passes, SupernetPasses) else None

    def _on_dev(self) -> Evaluation:
        prepared = self.prepared
        return evaluate(prepared.recogniser, prepared.corpora.dev, features=prepared.dev_features)

    def _save(self, metric: float | None, *, passing: bool) -> None:
        if self.main:
            tensors, optimizer = pack_optimizer(self.optimizer)
            # nothing here draws from these streams, but an objective or a step of the user's may
            random_tensors, random_state = pack_random()
            model = {name: t for name, t in self.model.state_dict().items()}
            place = {"step": self.place.step, "epoch": self.place.epoch, "index": self.place.index}
            self.keeper.save(
                self.place.step,
                metric,
                tensors={"model": model, "optimizer": tensors, "random": random_tensors},
                state={
                    "place": place,
                    "optimizer": optimizer,
                    "random": random_state,
                    "plan": self.prepared.plan.fingerprint,
                    "limits": self.limits.state(),
                    "run": self.config.fingerprint(),
                    "seed": self.config.seed,
                },
                passing=passing,
            )
        self.accelerator.wait_for_everyone()

    def _restore(self, loaded: Loaded) -> None:
        self.model.load_state_dict(loaded.tensors["model"])
        unpack_optimizer(self.optimizer, loaded.tensors["optimizer"], loaded.state["optimizer"])
        unpack_random(loaded.tensors["random"], loaded.state["random"])
        place = loaded.state["place"]
        self.place.step, self.place.epoch, self.place.index = place["step"], place["epoch"], place["index"]
        self.limits.restore(loaded.state["limits"])
        self.watcher.note(f"resumed after step {self.place.step}")

    def _finish(self) -> Path:
        """The best checkpoint on dev, or the mean of the last ones where that is better; saved with its card."""
        folder = self.output / "model"
        if self.main:
            chosen = self._choose()
            self.model.float()
            recogniser = self.prepared.recogniser
            with _in_place_of(folder) as made:
                _save_aside(recogniser, made)
                if isinstance(self.passes, SupernetPasses):
                    save_sizes(made, self.passes, self._forwards, self.prepared, self.watcher, frozen=self.frozen)
                provenance = Provenance.of(self.config, self.prepared.corpora, chosen, self.command)
                write_card(made, recogniser, provenance, self.prepared.corpora, self.watcher)
        self.accelerator.wait_for_everyone()
        distributed.stop_group()
        return folder

    def _choose(self) -> str:
        """Load what is best on dev: the best checkpoint, the same with statistics measured anew, or a mean of the last.

        Statistics that were gathered in training are of masked sound, and of weights that have moved on since.
        """
        best = self.keeper.best() or self.keeper.newest()
        if best is None:
            raise CheckpointError(f"{self.keeper.folder} holds no checkpoint to save; run the same command again")
        weights = partial(self._load, lambda: load(best.path).tensors["model"])
        made = {best.path.name: partial(weights, anew=False)}
        rates = {best.path.name: best.metric}
        if not self.frozen and list(batchnorm.masked_norms(self.model)):
            made[f"{best.path.name}, statistics measured anew"] = partial(weights, anew=True)
        if (count := self.config.train.average) > 1:
            last = [k.path for k in self.keeper.list() if not k.passing and self._growing(k.step - 1) is None][-count:]
            name = f"mean of {', '.join(p.name for p in last)}"
            made[name] = partial(self._load, lambda: average(last), anew=not self.frozen)
        loaded = ""
        for name, make in made.items():
            if name not in rates:
                make()
                loaded, rates[name] = name, self._on_dev().words.rate
                self.watcher.note(f"{name}: dev WER {rates[name]:.2%}")
        # of equals the first, which is what training itself came to
        chosen = min(rates, key=lambda name: math.inf if rates[name] is None else float(rates[name] or 0.0))
        if chosen != loaded:
            made[chosen]()
        return chosen

    def _load(self, weights: Callable[[], Mapping[str, Tensor]], *, anew: bool) -> None:
        """Take weights; with ``anew`` measure their statistics, which of a mean are not the mean of statistics."""
        self.model.load_state_dict(weights())
        if anew:
            batchnorm.recalibrate(self.model, self._forwards())

    def _forwards(self) -> Iterator[Any]:
        """Passes over training data without augmentation, from which statistics are measured."""
        prepared, recogniser = unaugmented(self.prepared), self.prepared.recogniser
        batches = (b for step in feed(prepared, 0, 0) for b in step)
        device, dtype = self.accelerator.device, self.model.dtype
        for _, batch in zip(range(batchnorm.RECALIBRATION_BATCHES), batches, strict=False):
            here = batch.to(device, dtype)
            yield partial(recogniser.family.encode, self.model, here.features_BTF, here.len_B)


def claim_folder(config: RunConfig) -> None:
    """Write ``run.yaml``, or see that the one that is there is of the same run. UsageError lists what differs.

    A run that was refused before anything was planned does not hold its folder.
    """
    output = Path(config.output)
    path, aside = output / "run.yaml", output / "run.yaml.tmp"
    if path.exists():
        there = read_run(path)
        if there.fingerprint() == config.fingerprint():
            return
        if any(file.is_file() and file.name not in _UNPLANNED for file in output.rglob("*")):
            differing = ", ".join(_differences(there.decisive(), config.decisive()))
            raise UsageError(
                f"{output} holds a run with other settings ({differing}); "
                "use the same settings to resume it, or another output"
            )
    # a process killed while it claimed the folder has left the second
    elif output.exists() and (not output.is_dir() or any(file != aside for file in output.iterdir())):
        raise UsageError(f"output = {output}: is there already and is no run's folder; choose another output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        aside.write_text(what_null_means(config) + config.to_yaml(), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise WorkError(f"output = {output}: cannot be written ({error}); choose a folder you may write to") from error


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted({*one, *other})
        return [d for n in names for d in _differences(one.get(n), other.get(n), f"{path}.{n}" if path else n)]
    return [] if one == other else [f"{path}: {one!r} there, {other!r} here"]


@contextmanager
def _in_place_of(folder: Path) -> Iterator[Path]:
    """Where to write a model: its folder, or beside it while a finished one is there, which it then replaces."""
    if not (folder / CARD).exists():
        yield folder
        return
    aside = folder.with_name(f"{folder.name}.new")
    try:
        yield aside
        place(aside, folder, lambda _: None)
    except OSError as error:
        raise WorkError(
            f"{folder}: cannot be replaced ({error}); free space, then run the same command again"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _save_aside(recogniser: Recogniser, folder: Path) -> None:
    """A folder that is whole whenever it is there."""
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        recogniser.save(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)
    except (OSError, SafetensorError) as error:  # the second is how the library reports a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise WorkError(
            f"{folder}: cannot be written ({error}); free space, then run the same command again"
        ) from error
