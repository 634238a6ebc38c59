"""Run files: every mistake at once, each with its way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manyvoice.config import make_run, read_run
from manyvoice.errors import ConfigError, UsageError

LEAST = {"output": "runs/x", "corpus": {"train": "a.jsonl"}}


def test_what_is_left_out_has_a_default_and_all_is_written_down(tmp_path: Path) -> None:
    run = make_run(LEAST, ["train.epochs=3", "augment.speed=[0.9, 1.1]", "corpus.train=[a, b]"])
    path = tmp_path / "run.yaml"
    path.write_text(run.to_yaml())
    assert read_run(path) == run
    assert (run.train.epochs, run.corpus.train, run.augment.speed) == (3, ["a", "b"], [0.9, 1.1])


def test_the_fingerprint_ignores_place_and_workers_only() -> None:
    same = [[], ["output=elsewhere"], ["train.workers=3"], ["train.threads=1"]]
    assert len({make_run(LEAST, o).fingerprint() for o in same}) == 1
    other = [["seed=1"], ["train.epochs=9"], ["corpus.train=b"], ["model.settings.dropout=0.1"]]
    assert len({make_run(LEAST, o).fingerprint() for o in [[], *other]}) == 5


def test_all_mistakes_come_together() -> None:
    settings = {"corpus": {"train": "a", "trian": 1}, "optimizer": {"name": "sgd", "lr": -1}, "batches": {}}
    with pytest.raises(ConfigError) as caught:
        make_run(settings, ["nonsense", "output.x.y=1", "train.keep_last=two"])
    text = str(caught.value)
    for part in (
        "did you mean 'train'?", "did you mean 'batch'?", "optimizer.lr = -1", "optimizer.name = 'sgd'",
        "override = 'nonsense': must look like a.b=c", "train.keep_last = 'two'", "output",
    ):  # fmt: skip
        assert part in text, part
    assert len(caught.value.mistakes) >= 7
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["model.preset=null"], "needs a preset or a base"),
        (["model.base=x", "model.settings.dropout=0.1"], "cannot change the shape of a base"),
        (["augment.snr_db=[20, 5]"], r"must be low, high; give \[5.0, 20.0\]"),
        (["train.average=5"], r"averages more checkpoints than train\.keep_last = 2 keeps; set train\.keep_last=5"),
        (["seed.x=1"], "seed is a value, not a section|seed"),
        (["corpus.train=[a"], "is not a YAML value"),
    ],
)
def test_settings_that_do_not_go_together(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_run({**LEAST, "seed": 0}, overrides)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a: [1", "not YAML"),
        (b"- 1", "must be a mapping"),
        (b"", "must be a mapping"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_files_that_are_no_run_files(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=text):
        read_run(path)
    with pytest.raises(UsageError, match=r"nothing\.yaml: cannot be read"):
        read_run(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("override", ["batch.seconds=.inf", "optimizer.lr=.nan", "augment.snr_db=[1, .inf]"])
def test_numbers_are_finite(override: str) -> None:
    with pytest.raises(ConfigError, match=rf"{override.partition('=')[0]}.* finite number"):
        make_run(LEAST, [override])


@pytest.mark.parametrize("content", ["a: &x [*x]", "2020-01-01: x", "? [a, b]\n: c"])
def test_yaml_that_json_cannot_hold_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"run\.yaml: "):
        read_run(path)


def test_growing_wants_the_sandwich_rule_and_a_new_model_grows_unasked() -> None:
    assert make_run(LEAST, ["elastic.grow=0.5"]).grow == 0.5
    assert make_run(LEAST, ["elastic={}"]).grow > 0
    assert make_run(LEAST, ["elastic.sandwich=false"]).grow == make_run(LEAST, []).grow == 0
    assert make_run(LEAST, ["elastic={}", "model.preset=null", "model.base=b"]).grow == 0
    with pytest.raises(ConfigError, match=r"elastic\.grow = 0\.5: is for the sandwich rule"):
        make_run(LEAST, ["elastic.grow=0.5", "elastic.sandwich=false"])


def test_a_rate_for_another_optimiser_is_refused_where_none_is_named() -> None:
    new: dict[str, Any] = {"output": "o", "corpus": {"train": "a"}}
    tuned = new | {"model": {"base": "b"}}
    assert make_run(new, ["optimizer.lr=0.03"]).optimizer_name == "scaledadam"
    assert make_run(tuned, ["optimizer.lr=3e-4"]).optimizer_name == "adamw"
    assert make_run(new, ["optimizer.lr=3e-4", "optimizer.name=adamw"]).optimizer_name == "adamw"
    with pytest.raises(ConfigError, match=r"no rate for scaledadam.* optimizer\.name=adamw if that is meant"):
        make_run(new, ["optimizer.lr=3e-4"])
    with pytest.raises(ConfigError, match=r"no rate for adamw.* optimizer\.name=scaledadam if that is meant"):
        make_run(tuned, ["optimizer.lr=0.03"])
