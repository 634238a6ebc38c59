"""Whole runs of a tiny model: optimisers, precisions, averaging, fine-tuning, and folders that are refused."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from manyvoice.config import CorpusConfig, RunConfig, make_run
from manyvoice.data.manifest import open_corpus
from manyvoice.decode.recogniser import Recogniser
from manyvoice.errors import CheckpointError, UsageError, WorkError
from manyvoice.models.batchnorm import masked_norms
from manyvoice.recipes import train as recipe
from manyvoice.recipes.card import read_card
from manyvoice.recipes.prepare import feed, open_corpora, prepare, unaugmented
from manyvoice.recipes.train import claim_folder, train
from manyvoice.recipes.watch import Silent
from manyvoice.train.checkpoint import Keeper
from manyvoice.train.metrics import TIMINGS, MetricsLog, read_metrics
from manyvoice.train.step import PlainStep

Made = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def configure(
    tmp_path_factory: pytest.TempPathFactory,
    speak_tones: Callable[[Path, int, int], Path],
    tiny_settings: dict[str, int],
) -> Made:
    """A run of one epoch on twelve utterances; changes come as ``train__epochs=2``."""
    corpus = speak_tones(tmp_path_factory.mktemp("speech") / "tones", 12, 0)

    def make(output: Path, **changes: object) -> RunConfig:
        settings = {
            "output": str(output),
            "corpus": {"train": str(corpus), "dev_share": 0.25},
            "tokenizer": {"kind": "words"},
            "model": {"settings": tiny_settings},
            "batch": {"seconds": 2, "bins": 2},
            "train": {"epochs": 1},
        }
        return make_run(settings, [f"{name.replace('__', '.')}={value}" for name, value in changes.items()])

    return make


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def plain(configure: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one epoch with all defaults."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(configure(folder))
    return folder


def test_scaledadam_with_eden_learns(configure: Made, tmp_path: Path) -> None:
    train(configure(tmp_path / "run", optimizer__name="scaledadam", optimizer__schedule="eden", train__epochs=6))
    lines = read_metrics(tmp_path / "run")
    assert lines[0]["lr"] < max(line["lr"] for line in lines) <= 0.045
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_bf16_follows_fp32_in_one_process(configure: Made, plain: Path, tmp_path: Path) -> None:
    train(configure(tmp_path / "run", train__precision="bf16"))
    found = losses(tmp_path / "run")
    assert found == pytest.approx(losses(plain), rel=0.05)
    assert found != losses(plain), "nothing ran in bfloat16"
    assert {t.dtype for t in weights(tmp_path / "run" / "model").values()} <= {torch.float32, torch.int64}


def test_runs_on_the_same_speech_share_a_cache(configure: Made, plain: Path, tmp_path: Path) -> None:
    def kept() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in (tmp_path / "features").rglob("*") if p.is_file()}

    train(configure(tmp_path / "one", corpus__cache=tmp_path / "features"))
    made = kept()
    assert len(made) == 4, "data and index of two parts"
    train(configure(tmp_path / "two", corpus__cache=tmp_path / "features", seed=1, corpus__dev_share=0.5))
    train(configure(tmp_path / "three", corpus__cache=tmp_path / "features"))
    assert {name: kept()[name] for name in made} == made
    assert len(kept()) == 8, "other rows are another cache"
    assert not (tmp_path / "one" / "cache").exists()
    assert losses(tmp_path / "three") == losses(tmp_path / "one") == losses(plain)
    fingerprints = {configure(tmp_path / "x", corpus__cache=c).fingerprint() for c in ("true", tmp_path, "other")}
    assert len(fingerprints) == 1


def test_dev_is_split_by_speaker_only_where_all_are_known(speak_tones: Callable[..., Path], tmp_path: Path) -> None:
    spoken = [replace(u, speaker=f"s{k}") for k, u in enumerate(open_corpus(speak_tones(tmp_path / "tones", 12, 0)))]
    for name, rows, told in (
        ("known", [replace(u, id=f"{u.id}-{k}") for u in spoken for k in range(2)], 0),
        ("partly", [*spoken[1:], replace(spoken[0], speaker=None)], 1),
        ("few", spoken[:9], 1),
    ):
        open_corpus(rows).write(tmp_path / f"{name}.jsonl")
        notes: list[str] = []
        watcher = SimpleNamespace(note=notes.append, progress=lambda *_: None)
        parts = open_corpora(CorpusConfig(train=str(tmp_path / f"{name}.jsonl"), dev_share=0.25), 0, watcher)
        assert len(parts.train) + len(parts.dev) == len(rows) and len(parts.dev) >= 2
        assert len([note for note in notes if "the same people may be on both sides" in note]) == told
        assert told or not set(parts.train.speakers()) & set(parts.dev.speakers())


def test_activation_checkpointing_changes_no_loss(configure: Made, tmp_path: Path) -> None:
    dropout = {"model__settings__dropout": 0.1, "model__settings__activation_dropout": 0.1}
    for name, on in (("without", False), ("with", True)):
        options = {"train__precision": "fp64", "train__activation_checkpointing": on, "batch__accumulate": 2}
        train(configure(tmp_path / name, **dropout, **options))
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-9)
    dev = [read_metrics(tmp_path / name)[-1]["dev_loss"] for name in ("with", "without")]
    assert dev[0] == pytest.approx(dev[1], rel=1e-9)


def test_an_average_of_checkpoints_can_be_the_model(
    configure: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keeper, "best", lambda self: None)  # then the newest counts, which has no better claim
    monkeypatch.setattr(recipe.Training, "_evaluate", lambda self: {"dev_loss": 1.0})
    model = train(configure(tmp_path / "run", train__epochs=4, train__average=3, train__keep_last=3))
    kept = Keeper(tmp_path / "run" / "checkpoints", last=3).list()
    assert read_card(model)["checkpoint"] == "mean of " + ", ".join(k.path.name for k in kept)
    found = weights(model)["ctc_head.weight"]
    parts = [load_file(k.path / "model.safetensors")["ctc_head.weight"].double() for k in kept]
    torch.testing.assert_close(found.double(), sum(parts) / 3, atol=1e-7, rtol=1e-6)
    norms = [n for n in weights(model) if n.endswith("running_mean")]
    assert any(not torch.equal(weights(model)[n], load_file(kept[-1].path / "model.safetensors")[n]) for n in norms)


@pytest.mark.parametrize("better", [True, False])
def test_statistics_measured_anew_are_taken_where_dev_says_so(
    configure: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    monkeypatch.setattr(recipe.Training, "_evaluate", lambda self: {"dev_wer": 0.5})
    found = SimpleNamespace(words=SimpleNamespace(rate=0.4 if better else 0.6))
    monkeypatch.setattr(recipe.Training, "_on_dev", lambda self: found)
    model = train(configure(tmp_path / "run", augment__time_share=0.5))
    (kept,) = Keeper(tmp_path / "run" / "checkpoints", last=3).list()
    anew = f"{kept.path.name}, statistics measured anew"
    assert read_card(model)["checkpoint"] == (anew if better else kept.path.name)
    ours, there = weights(model), load_file(kept.path / "model.safetensors")
    same = {name: torch.equal(ours[name], there[name]) for name in ours}
    assert all(same[name] for name in ours if "running_" not in name and "num_batches" not in name)
    assert any(not same[name] for name in ours if "running_" in name) == better


def test_statistics_are_measured_again_on_sound_as_it_is(configure: Made, tmp_path: Path) -> None:
    """Otherwise masks and noise of training would be in the statistics of an averaged model."""
    run = configure(tmp_path / "run", augment__time_share=0.5, augment__speed="[0.9, 1.1]", train__epochs=2)
    prepared = prepare(run, Silent(), measure=lambda *_: pytest.fail("batch.seconds needs no measuring"))
    epochs = [[b for s in feed(unaugmented(prepared), e, 0) for b in s] for e in (0, 1)]
    sums = [[float(b.features_BTF.double().square().sum()) for b in batches] for batches in epochs]
    frames = [sorted(int(n) for b in batches for n in b.len_B) for batches in epochs]
    masked = [b.features_BTF for s in feed(prepared, 0, 0) for b in s]
    assert frames[0] == frames[1]
    assert math.fsum(sums[0]) == pytest.approx(math.fsum(sums[1]), rel=1e-9)
    assert math.fsum(float(x.double().square().sum()) for x in masked) < 0.95 * math.fsum(sums[0])


@pytest.mark.parametrize("average", [1, 2])
def test_fine_tuning_leaves_the_statistics_of_the_base_alone(
    configure: Made, plain: Path, tmp_path: Path, average: int
) -> None:
    options = {"train__epochs": 2, "train__average": average, "optimizer__lr": 0.01, "optimizer__name": "adamw"}
    tuned = weights(train(configure(tmp_path / "run", model__base=plain / "model", model__settings="{}", **options)))
    base = weights(plain / "model")
    assert tuned.keys() == base.keys()
    running = [n for n in base if "running_" in n or "num_batches" in n]
    assert len(running) >= 6
    for name in running:
        assert torch.equal(tuned[name], base[name]), name
    assert any(not torch.equal(tuned[n], base[n]) for n in base if n not in running)


def test_what_a_run_leaves_open_stands_in_its_file(configure: Made, tmp_path: Path) -> None:
    claim_folder(configure(tmp_path / "new", elastic__sizes="[1.0, 0.5]"))
    text = (tmp_path / "new" / "run.yaml").read_text()
    assert text.startswith("# optimizer.name: null is scaledadam here\n# optimizer.lr: null is 0.02 here\n")
    assert "# elastic.grow: null is 0.3 here\n" in text
    claim_folder(configure(tmp_path / "said", optimizer__name="adamw", optimizer__lr=0.001, optimizer__weight_decay=0))
    assert "#" not in (tmp_path / "said" / "run.yaml").read_text()


def test_a_second_start_of_a_finished_run_changes_nothing(configure: Made, plain: Path) -> None:
    before = (read_metrics(plain), (plain / "model" / "model.safetensors").read_bytes())
    train(configure(plain))
    assert (read_metrics(plain), (plain / "model" / "model.safetensors").read_bytes()) == before


def test_another_run_in_the_same_folder_is_told_what_differs(configure: Made, plain: Path) -> None:
    with pytest.raises(UsageError, match="holds a run with other settings") as caught:
        train(configure(plain, seed=3, optimizer__lr=0.5, train__workers=2))
    assert "(optimizer.lr: None there, 0.5 here, seed: 0 there, 3 here)" in str(caught.value)


def test_a_folder_claimed_by_a_process_that_was_killed_is_claimed_again(configure: Made, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml.tmp").write_text("outp")
    claim_folder(configure(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.yaml"]


def outcome(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    lines = [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(folder)]
    return lines, (folder / "model" / "model.safetensors").read_bytes()


def test_a_stop_does_not_change_which_checkpoints_are_averaged(
    configure: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of a stop in the last epoch must not push the one of the epoch before out."""
    options = {"train__epochs": 3, "train__average": 2, "train__keep_last": 2, "optimizer__lr": 0.01}
    train(configure(tmp_path / "whole", **options))
    plain, steps = PlainStep.__call__, len(read_metrics(tmp_path / "whole"))

    def step(self: PlainStep, micro: Any, place: Any) -> dict[str, float]:
        if place.step == steps - 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, micro, place)

    with monkeypatch.context() as patch:
        patch.setattr(PlainStep, "__call__", step)
        with pytest.raises(WorkError, match="stopped by SIGTERM"):
            train(configure(tmp_path / "stopped", **options))
    assert Keeper(tmp_path / "stopped" / "checkpoints", last=2).list()[-1].passing
    train(configure(tmp_path / "stopped", **options))
    kept = [[k.path.name for k in Keeper(tmp_path / n / "checkpoints", last=2).list()] for n in ("whole", "stopped")]
    assert kept[0] == kept[1]
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_under_the_log_is_said_and_the_run_goes_on_later(
    configure: Made, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, start = configure(tmp_path / "run"), MetricsLog.__init__

    def on_a_full_disk(self: Any, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        self._file.close()
        self._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "__init__", on_a_full_disk)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be written .*No space left.*to resume"):
            train(config)
    train(config)
    assert outcome(tmp_path / "run") == outcome(plain)


def test_a_full_disk_under_the_model_is_said(configure: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Recogniser, "save", full)
    with pytest.raises(WorkError, match="start: cannot be written .*No space left on device.*run the same command"):
        train(configure(tmp_path / "run"))


def test_a_gradient_that_is_not_finite_moves_no_weight(
    configure: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, seen = torch.nn.utils.get_total_norm, []

    def overflowing(*args: Any, **options: Any) -> torch.Tensor:
        seen.append(norm(*args, **options))
        return seen[-1] * (math.inf if len(seen) == 3 else 1.0)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", overflowing)
    config = configure(tmp_path / "run", train__checkpoint_every=1)
    with pytest.raises(WorkError, match=r"the gradient is inf at step 2 on .*\d.*; resume from the last checkpoint"):
        train(config)
    kept = Keeper(tmp_path / "run" / "checkpoints", last=2).list()
    assert kept[-1].step == 2
    assert all(torch.isfinite(t).all() for t in load_file(kept[-1].path / "model.safetensors").values())


def test_the_statistics_of_a_new_model_do_move(configure: Made, plain: Path) -> None:
    start = Recogniser.load(plain / "start").model
    done = Recogniser.load(plain / "model").model
    pairs = zip(masked_norms(start), masked_norms(done), strict=True)
    assert all(not torch.equal(a.running_mean, b.running_mean) for a, b in pairs)  # type: ignore[arg-type]


def test_a_base_takes_a_new_vocabulary(configure: Made, plain: Path, tmp_path: Path) -> None:
    """The encoder of one task starts another, whose words it has never written."""
    options = {"model__base": plain / "model", "model__settings": "{}", "model__new_vocabulary": "true"}
    model = train(configure(tmp_path / "run", tokenizer__kind="characters", train__epochs=1, **options))
    assert len(Recogniser.load(model).tokenizer) != len(Recogniser.load(plain / "model").tokenizer)
    start, base = weights(tmp_path / "run" / "start"), weights(plain / "model")
    shared = [n for n in base if n.startswith("encoder.")]
    assert shared and all(torch.equal(start[n], base[n]) for n in shared)
