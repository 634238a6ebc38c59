"""A run that says nothing about batch sizes finds them, keeps them, and survives running out of memory."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from manyvoice.config import RunConfig, make_run
from manyvoice.data.manifest import open_corpus
from manyvoice.errors import CheckpointError, CorpusError, UsageError, WorkError
from manyvoice.recipes import ready
from manyvoice.recipes import train as recipe
from manyvoice.recipes.batching import read_plan
from manyvoice.recipes.prepare import open_corpora
from manyvoice.recipes.profile import profile_of_folder, profile_of_run
from manyvoice.recipes.train import train
from manyvoice.train import objective
from manyvoice.train.metrics import read_metrics
from manyvoice.train.objective import Loss

Made = Callable[..., RunConfig]


class Listener:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, stage: str, done: int, total: int) -> None: ...

    def step(self, line: Any, epochs: int, left: float | None) -> None: ...


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, speak_tones: Callable[[Path, int, int], Path]) -> Path:
    return speak_tones(tmp_path_factory.mktemp("speech") / "tones", 24, 0)


@pytest.fixture
def configure(corpus: Path, tiny_settings: dict[str, int]) -> Made:
    def make(output: Path, **changes: object) -> RunConfig:
        settings = {
            "output": str(output),
            "corpus": {"train": str(corpus), "dev_share": 0.2},
            "tokenizer": {"kind": "words"},
            "model": {"settings": tiny_settings},
            "train": {"epochs": 2},
        }
        return make_run(settings, [f"{name.replace('__', '.')}={value}" for name, value in changes.items()])

    return make


def test_sizes_are_measured_once_and_written_down(configure: Made, tmp_path: Path) -> None:
    heard, again = Listener(), Listener()
    train(configure(tmp_path / "run", batch__memory="3GiB", batch__updates=3, batch__least=0), watcher=heard)
    assert any("measuring how many" in n for n in heard.notes)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert "3GiB" in plan["source"] and "3 updates an epoch leave" in plan["source"]
    assert plan["steps_per_epoch"] >= 3
    assert all(1 <= row["size"] <= row["fits"] for row in plan["bins"])
    train(configure(tmp_path / "other", batch__memory="3GiB", batch__updates=3, batch__least=0), watcher=again)
    assert not any("measuring how many" in n for n in again.notes), "the same job is remembered"
    for line in read_metrics(tmp_path / "run"):
        assert 0 <= line["padding"] < 1 and 0 <= line["token_padding"] < 1


def test_every_utterance_of_an_epoch_is_in_the_log(configure: Made, tmp_path: Path) -> None:
    """The sum of their ids' checksums does not depend on how steps were shared."""
    train(configure(tmp_path / "run", batch__memory="3GiB", batch__updates=4, batch__least=0))
    expected = sum(crc32(u.id.encode()) for u in open_corpus(tmp_path / "run" / "train.jsonl"))
    lines = read_metrics(tmp_path / "run")
    for epoch in (0, 1):
        assert sum(line["ids"] for line in lines if epoch < line["epoch"] <= epoch + 1) == expected


def test_a_small_corpus_is_not_trained_on_one_utterance_at_a_time(configure: Made, tmp_path: Path) -> None:
    heard = Listener()
    train(configure(tmp_path / "run", batch__memory="3GiB", batch__least=2, train__epochs=1), watcher=heard)
    assert any("batch.updates goes no lower than 2.0 s a batch" in n for n in heard.notes)
    assert max(line["utterances"] for line in read_metrics(tmp_path / "run")) > 1


def test_a_resumed_run_keeps_its_sizes_whatever_memory_there_is(
    configure: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    train(configure(folder, batch__memory="3GiB", batch__updates=4, batch__least=0, train__epochs=1))
    (folder / "model" / "config.json").unlink()
    monkeypatch.setattr(recipe.Sizer, "__call__", lambda *_: pytest.fail("sizes stand in plan.json"))
    train(configure(folder, batch__memory="2GiB", batch__updates=4, batch__least=0, train__epochs=1))


def test_running_out_of_memory_lowers_a_bin_and_goes_on(
    configure: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a resume: the checkpoint knows the smaller size."""
    tried: list[int] = []

    def small(model: Any, batch: Any) -> Loss:
        tried.append(len(batch))
        if len(tried) == 5:
            os.kill(os.getpid(), signal.SIGTERM)  # the step that runs is finished, then the run stops
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return objective.ctc(model, batch)

    monkeypatch.setattr(ready, "flat_ctc", small)
    heard = Listener()
    run = configure(tmp_path / "run", batch__seconds=8, batch__bins=2)
    with pytest.raises(WorkError, match="stopped by"):
        train(run, watcher=heard)
    told = [n for n in heard.notes if "out of memory at step" in n]
    assert told and "run at once" in told[0] and "plan version 1" in told[0]
    state = next((tmp_path / "run" / "checkpoints").glob("*/state.json"))
    assert json.loads(state.read_text())["limits"]
    train(run)
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["plan_version"] >= 1
    assert sum(line["utterances"] for line in lines if line["epoch"] <= 1) == len(
        open_corpus(tmp_path / "run" / "train.jsonl")
    )
    shown = profile_of_folder(tmp_path / "run")
    assert any("memory ran out" in line for line in shown["summary"])


def test_a_limit_below_one_utterance_is_refused(configure: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"batch\.memory: one utterance of .* does not fit into 0\.0\d GiB"):
        train(configure(tmp_path / "run", batch__memory="64MiB"))


def test_an_amount_that_is_none_is_refused(configure: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="memory 'lots': must be an amount such as 8GiB"):
        train(configure(tmp_path / "run", batch__memory="lots"))


def test_a_plan_of_another_corpus_is_refused_on_resume(
    configure: Made, tmp_path: Path, speak_tones: Callable[[Path, int, int], Path]
) -> None:
    path = speak_tones(tmp_path / "own", 16, 3)
    changes = {"corpus__train": path, "batch__seconds": 6, "train__epochs": 1}
    train(configure(tmp_path / "run", **changes))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(CheckpointError, match="other training data or other batches; put the manifests back"):
        train(configure(tmp_path / "run", **changes))


def test_a_damaged_plan_is_named(configure: Made, tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "plan.json"
    for text in ("{", "[]", '{"bins": 3}', json.dumps({"corpus": open_corpus(corpus).fingerprint, "bins": [{}]})):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"plan\.json: is damaged"):
            read_plan(path, open_corpus(corpus))
    assert read_plan(tmp_path / "none.json", open_corpus(corpus)) is None


def test_strict_bins_name_who_speaks_too_fast(
    configure: Made, tmp_path: Path, speak_tones: Callable[[Path, int, int], Path]
) -> None:
    path = speak_tones(tmp_path / "own", 60, 4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    shortest = min(rows, key=lambda r: r["duration"])
    shortest["text"] = "low mid high low mid high low"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    changes: dict[str, object] = {
        "corpus__train": path, "corpus__dev": path, "batch__seconds": 6, "batch__strict": True, "batch__bins": 3,
        "model__settings": "{subsampling_factor: 2, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
        "intermediate_size: 16, subsampling_conv_channels: 4}",
    }  # fmt: skip
    with pytest.raises(CorpusError, match=r"batch\.strict: 1 utterances have more tokens .*7 tokens in .*skip_bad"):
        train(configure(tmp_path / "run", **changes))
    heard = Listener()
    train(configure(tmp_path / "kept", **changes, corpus__skip_bad=True, train__epochs=1), watcher=heard)
    assert "batch.strict: 1 of 60 utterances left out" in heard.notes
    train(configure(tmp_path / "kept", **changes, corpus__skip_bad=True, train__epochs=1))  # resumes


def test_a_profile_shows_sizes_and_why(configure: Made, tmp_path: Path) -> None:
    run = configure(tmp_path / "none", batch__memory="3GiB", batch__updates=5, batch__least=0)
    shown = profile_of_run(run, Listener())
    assert not (tmp_path / "none").exists()
    dev = len(open_corpora(run.corpus, run.seed, Listener()).dev)
    assert {row["bound by"] for row in shown["bins"]} <= {"updates", "memory", "its utterances"}
    assert sum(row["utterances"] for row in shown["bins"]) == 24 - dev
    assert any("drawn at random would have" in line for line in shown["summary"])
    train(run)
    folder = profile_of_folder(tmp_path / "none")
    assert sum(row["steps"] for row in folder["bins"]) <= len(read_metrics(tmp_path / "none"))
    assert sum("epoch" in line and "updates," in line for line in folder["summary"]) == 2
    with pytest.raises(UsageError, match=r"holds no plan\.json of a run"):
        profile_of_folder(tmp_path)
