"""Benchmarks: rows append, aims are computed, and each benchmark runs at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from manyvoice.errors import UsageError
from manyvoice.recipes.bench import Aim, run_question
from manyvoice.recipes.watch import Silent

SOURCE = """
from manyvoice.recipes.bench import Aim
def run(bench):
    bench.row(seed=0, value=float(bench.option("value", "1")))
    bench.aims = [Aim(name="small", sense="at most", limit=2, unit="things", measured=bench.rows[-1]["value"])]
"""


def test_runs_append_and_aims_are_computed(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    (folder / "my_question.py").write_text(SOURCE)
    run_question("my-question", [], Silent(), work=tmp_path / "work", folder=folder)
    found = run_question("my-question", ["value=3"], Silent(), work=tmp_path / "work", folder=folder)
    assert [row["value"] for row in found["rows"]] == [1.0, 3.0]
    assert found == json.loads((folder / "results" / "my-question.json").read_text())
    [aim] = found["aims"]
    assert (aim["aim"], aim["measured"], aim["holds"]) == ("at most 2 things", 3.0, False)
    assert {"date", "commit", "machine", "command", "seed"} <= set(found["rows"][0])
    assert "value=3" in found["rows"][1]["command"]


def test_an_option_that_nothing_asks_for_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    (folder / "my_question.py").write_text(SOURCE)
    notes: list[str] = []
    watcher = SimpleNamespace(note=notes.append, progress=lambda *_: None)
    run_question("my-question", ["value=3", "valeu=2"], watcher, work=tmp_path / "work", folder=folder)
    assert notes == ["valeu: nothing asked for this; the file my_question.py says which options there are"]


def test_rows_name_no_folder_of_one_machine(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    (folder / "my_question.py").write_text(SOURCE)
    options = [f"base={tmp_path / 'bench' / 'digits' / 'model'}", "on=/somewhere/else/choose.jsonl", "lrs=1e-3"]
    found = run_question("my-question", options, Silent(), work=tmp_path / "bench" / "work", folder=folder)
    said = "manyvoice bench my-question base=runs/bench/digits/model on=choose.jsonl lrs=1e-3"
    assert found["rows"][0]["command"] == said


@pytest.mark.parametrize(
    ("sense", "measured", "holds"),
    [
        ("at most", 2.0, True),
        ("below", 2.0, False),
        ("at least", 2.0, True),
        ("equal", 1.9, False),
        ("at most", None, False),
    ],
)
def test_whether_an_aim_holds(sense: str, measured: float | None, holds: bool) -> None:
    aim = Aim(name="x", sense=sense, limit=2.0, unit="y", measured=measured)  # type: ignore[arg-type]
    assert aim.holds is holds


def test_wrong_questions_and_options(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no benchmark 'nonsense'; there are .*digits, kills, .*sentences, .*speed"):
        run_question("nonsense", [], Silent(), work=tmp_path)
    with pytest.raises(UsageError, match="option 'toy': must look like name=value"):
        run_question("speed", ["toy"], Silent(), work=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("question", ["sentences", "speed"])  # the others have tests of their own
def test_the_benchmark_runs_at_toy_size(question: str, data: Path, tmp_path: Path) -> None:
    options = ["toy=1", *(["arms=both", "report=both"] if question == "sentences" else [])]
    found = run_question(question, options, Silent(), work=tmp_path)
    assert found["rows"]
    assert json.loads((tmp_path / f"{question}.json").read_text()) == found
