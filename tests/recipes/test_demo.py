"""The demo at toy size: every part of the story runs, and a second start uses what the first has made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manyvoice.errors import UsageError
from manyvoice.recipes.demo import demo
from manyvoice.submodels.store import Store


class Notes:
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Nothing."""

    def step(self, line: object, epochs: int, left: float | None) -> None:
        """Nothing."""


@pytest.mark.slow
def test_the_whole_story(tmp_path: Path) -> None:
    told = Notes()
    done = demo(tmp_path / "demo", utterances=80, epochs=1, rounds=30, watcher=told)
    assert [row["size"] for row in done.sizes] == ["100", "75", "55", "40", "25"]
    assert len(done.heard) == 3 and done.wer == done.sizes[0]["wer"]
    assert json.loads(json.dumps(done.as_dict()))["seconds"].keys() == {
        "speak",
        "train",
        "sizes",
        "voices",
        "transcribe",
    }
    text = "\n".join(told.lines)
    assert all(f"{k} of 6" in text for k in range(1, 7))
    assert "padding was" in text and "drawn at random would have had" in text
    spoken = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo" / "speech").rglob("*")}
    again = demo(tmp_path / "demo", utterances=80, epochs=1, rounds=30)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "demo" / "speech").rglob("*")} == spoken
    assert again.wer == done.wer and again.voices == done.voices
    assert done.voices["speakers"] == 2 and done.voices["kept"] > 0, "or there is no receipt to look at"
    assert done.receipt is not None and done.receipt == again.receipt
    assert done.receipt["hash"] in {e.hash for e in Store(tmp_path / "demo" / "voices" / "voices").entries()}


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there already and no demo's folder"):
        demo(tmp_path)
    with pytest.raises(UsageError, match="thesis.txt is a file; choose a folder"):
        demo(tmp_path / "thesis.txt")
