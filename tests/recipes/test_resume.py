"""A run that is killed goes on to the same losses and the same weights, to the last bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from manyvoice.config import RunConfig, make_run
from manyvoice.errors import CheckpointError, UsageError, WorkError
from manyvoice.recipes import train as recipe
from manyvoice.recipes.train import train
from manyvoice.train import checkpoint
from manyvoice.train.checkpoint import Keeper
from manyvoice.train.metrics import TIMINGS, read_metrics
from manyvoice.train.step import PlainStep


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, speak_tones: Callable[[Path, int, int], Path]) -> Path:
    return speak_tones(tmp_path_factory.mktemp("speech") / "tones", 20, 0)


@pytest.fixture(scope="session")
def configure(corpus: Path, tiny_settings: dict[str, int]) -> Callable[..., RunConfig]:
    """A run of 3 epochs with dropout, SpecAugment, checkpoints every 3 steps and averaging."""

    def make(output: Path, **changes: Any) -> RunConfig:
        settings = {
            "output": str(output),
            "corpus": {"train": str(corpus), "dev_share": 0.2},
            "tokenizer": {"kind": "words"},
            "model": {"settings": {**tiny_settings, "activation_dropout": 0.1, "dropout": 0.1}},
            "augment": {"freq_width": 20},
            "batch": {"seconds": 3, "bins": 2, "accumulate": 2},
            "train": {"epochs": 3, "checkpoint_every": 3, "keep_last": 3, "average": 2},
        }
        return make_run(settings, [f"{name.replace('__', '.')}={value}" for name, value in changes.items()])

    return make


Made = Callable[..., RunConfig]


def outcome(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    """The log without what depends on the clock, and the weights."""
    lines = [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(folder)]
    return lines, (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def whole(configure: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(configure(folder))
    return folder


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked process; the number of the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    def arm(patch: pytest.MonkeyPatch) -> None:
        plain = PlainStep.__call__

        def step(self: PlainStep, micro: Any, place: Any) -> dict[str, float]:
            if place.step == number:
                die()
            return plain(self, micro, place)

        patch.setattr(PlainStep, "__call__", step)

    return arm


def kill_in_phase(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Die at the n-th phase of writing checkpoints: files written, synced, moved, old ones deleted."""

    def arm(patch: pytest.MonkeyPatch) -> None:
        plain, seen = Keeper.save, []

        def tell(phase: str) -> None:
            seen.append(phase)
            if len(seen) == number:
                die()

        patch.setattr(Keeper, "save", lambda *a, **k: plain(*a, **k, on_phase=tell))

    return arm


def kill_on(module: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(module, name, die)


@pytest.mark.parametrize(
    "arm",
    [
        kill_at_step(0),
        kill_at_step(4),
        *(kill_in_phase(n) for n in (1, 3, 5, 8, 10, 11, 14, 22, 35)),
        kill_on(recipe, "evaluate"),
        kill_on(recipe, "average"),
        kill_on(recipe, "write_card"),
    ],
)
def test_killed_and_started_again(
    configure: Made, whole: Path, tmp_path: Path, arm: Callable[[pytest.MonkeyPatch], None]
) -> None:
    config = configure(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        arm(patch)
        assert in_child(lambda: train(config)) == signal.SIGKILL, "the run was to be killed"
    assert not (tmp_path / "run" / "model" / "manyvoice.json").exists()
    train(config)
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_a_checkpoint(configure: Made, whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    config = configure(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        plain = PlainStep.__call__

        def step(self: PlainStep, micro: Any, place: Any) -> dict[str, float]:
            if place.step == 4:
                os.kill(os.getpid(), number)
            return plain(self, micro, place)

        patch.setattr(PlainStep, "__call__", step)
        with pytest.raises(WorkError, match=rf"stopped by {number.name} after step 5; .* the same command goes on"):
            train(config)
    assert [k.step for k in Keeper(tmp_path / "run" / "checkpoints", last=3).list()][-1] == 5
    train(config)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_equal_runs_are_equal_whatever_the_workers(configure: Made, whole: Path, tmp_path: Path) -> None:
    train(configure(tmp_path / "run", train__workers=2))
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__name": "scaledadam", "optimizer__schedule": "eden"},
        {"train__precision": "bf16"},
        {"augment__speed": "[0.9, 1.0, 1.1]", "augment__noise": 0.5},
        {"corpus__cache": "false", "train__average": 1},
    ],
)
def test_other_ways_to_train_resume_as_well(configure: Made, tmp_path: Path, changes: dict[str, Any]) -> None:
    train(configure(tmp_path / "whole", **changes))
    config = configure(tmp_path / "run", **changes)
    with pytest.MonkeyPatch.context() as patch:
        kill_at_step(5)(patch)
        assert in_child(lambda: train(config)) == signal.SIGKILL
    train(config)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_activation_checkpointing_changes_no_loss(configure: Made, tmp_path: Path) -> None:
    exact = {"train__precision": "fp64"}
    train(configure(tmp_path / "plain", **exact))
    train(configure(tmp_path / "thrifty", **exact, train__activation_checkpointing="true"))
    pairs = zip(read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "thrifty"), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-10) for a, b in pairs)


def test_fine_tuning_rests_the_statistics_and_moves_the_weights(configure: Made, whole: Path, tmp_path: Path) -> None:
    base = whole / "model"
    config = configure(tmp_path / "run", model__base=base, model__settings="{}", train__average=1)
    train(config)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "run" / "model"))
    assert all(torch.equal(before[n], after[n]) for n in before if "running_" in n)
    assert not torch.equal(before["ctc_head.weight"], after["ctc_head.weight"])


def test_another_seed_is_another_run(configure: Made, whole: Path, tmp_path: Path) -> None:
    train(configure(tmp_path / "run", seed=1))
    assert outcome(tmp_path / "run")[0] != outcome(whole)[0]


def stopped_run(configure: Made, folder: Path) -> RunConfig:
    """A run killed in its second epoch, with a few checkpoints."""
    config = configure(folder)
    with pytest.MonkeyPatch.context() as patch:
        kill_at_step(7)(patch)
        assert in_child(lambda: train(config)) == signal.SIGKILL
    return config


def test_a_damaged_newest_checkpoint_is_refused_and_the_one_before_offered(
    configure: Made, whole: Path, tmp_path: Path
) -> None:
    config = stopped_run(configure, tmp_path / "run")
    kept = Keeper(tmp_path / "run" / "checkpoints", last=3).list()
    weights = kept[-1].path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{kept[-1].path.name}(.|\n)*{kept[-2].path.name}"):
        train(config)
    with pytest.raises(UsageError, match="has no sound checkpoint 'step-9'; it has"):
        train(config, resume_from="step-9")
    train(config, resume_from=kept[-2].path.name)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_changed_corpus_is_refused_on_resume(
    configure: Made, corpus: Path, tmp_path: Path, speak_tones: Callable[[Path, int, int], Path]
) -> None:
    mine = speak_tones(tmp_path / "mine", 20, 0)
    config = make_run({**configure(tmp_path / "run").model_dump(mode="json"), "corpus": {"train": str(mine)}})
    with pytest.MonkeyPatch.context() as patch:
        kill_at_step(7)(patch)
        assert in_child(lambda: train(config)) == signal.SIGKILL
    lines = mine.read_text().splitlines()
    mine.write_text("\n".join([lines[0].replace('"text": "', '"text": "low '), *lines[1:]]) + "\n")
    with pytest.raises(CheckpointError, match="was written for other training data or other batches"):
        train(config)


def test_a_full_disk_loses_nothing(configure: Made, whole: Path, tmp_path: Path) -> None:
    config = configure(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        plain, saved = Keeper.save, []

        def save(*args: Any, **options: Any) -> Any:
            saved.append(1)
            if len(saved) == 3:
                patch.setattr(checkpoint, "_write_bytes", full)
            return plain(*args, **options)

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(Keeper, "save", save)
        with pytest.raises(CheckpointError, match="No space left on device"):
            train(config)
    assert len(Keeper(tmp_path / "run" / "checkpoints", last=3).list()) == 2
    train(config)
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_loss_that_is_not_finite_names_the_utterances(configure: Made, tmp_path: Path) -> None:
    config = configure(tmp_path / "run", optimizer__lr=1e30, optimizer__clip="null", optimizer__schedule="constant")
    with pytest.raises(WorkError, match=r"the loss is nan at step \d+ on .*; resume from the last"):
        train(config)


def test_foreign_files_and_unwritable_folders_are_left_alone(configure: Made, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="is there already and is no run's folder"):
        train(configure(tmp_path / "mine"))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match="is there already"):
        train(configure(tmp_path / "file"))
    with pytest.raises(WorkError, match="cannot be written"):
        train(configure(tmp_path / "file" / "below"))
    assert (
        json.dumps([p.read_text() for p in (tmp_path / "file", tmp_path / "mine" / "thesis.txt")]).count("precious")
        == 2
    )
