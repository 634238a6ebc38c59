"""``manyvoice voices``: what goes in, what comes out, what is told, and with which exit status."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from manyvoice.cli.console import table
from manyvoice.submodels.method import make_method
from manyvoice.submodels.store import Store
from manyvoice.submodels.voice import Voice

Command = Callable[..., CompletedProcess[str]]


def document(done: CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def voice(seed: int, **card: Any) -> Voice:
    gain = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    return Voice(method=make_method("scale"), tensors={("0.ff1.up", "gain"): gain}, base="b" * 64, tokenizer="d" * 64,
                 card=card)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    store = Store(tmp_path / "store")
    store.add(voice(1, speaker="Ann", licence="CC0-1.0", metrics={"base_wer": 0.25, "wer": 0.125}), "Ann")
    store.add(voice(2, speaker="Bo[/red]\x1b[2J", shared=True), "bob")
    return tmp_path / "store"


def test_list(place: Path, manyvoice: Command) -> None:
    listed = document(manyvoice("voices", place, "--json"))
    assert [(v["name"], v["method"], v["card"].get("licence")) for v in listed["voices"]] == [
        ("Ann", "scale", "CC0-1.0"), ("bob", "scale", None),
    ]  # fmt: skip
    shown = manyvoice("voices", place, "ls").stdout
    assert "25.00% -> 12.50%" in shown and "bbbbbbbbbbbb " in shown and "CC0-1.0" in shown
    assert "Bo[/red]\\x1b[2J" in shown and "\x1b" not in shown
    empty = manyvoice("voices", place, "ls", "--tenant", "clinic")
    assert empty.stdout.strip() == "no voices of tenant clinic; tenants here: default"


def terminal(monkeypatch: pytest.MonkeyPatch, *, width: int) -> io.StringIO:
    """Standard output as a terminal."""

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", screen)
    return screen


@pytest.mark.parametrize("width", [30, 60, 80])
def test_names_are_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    screen = terminal(monkeypatch, width=width)
    name, words = "en-gb-andy-4efffa", "synthetic speech, Apache-2.0"
    row = [name, "adapter", "960984c2b1ec", "56.3", name, words, "107%"]
    columns = ["name", "method", "base", "kB", "speaker", "licence", "WER"]
    table("", columns, [row], spare=["licence", "base", "kB", "speaker", "method"])
    shown = screen.getvalue()
    assert name in shown and "107%" in shown and words not in shown and "no room for licence" in shown
    assert ("56.3" in shown) == (width > 60) and "…" not in shown
    table("", ["name"], [["n" * 2 * width]])
    assert screen.getvalue().count("n" * (width - 4)) == 2, "folded, not cut"


def test_a_table_that_is_piped_is_as_wide_as_it_must_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table("", ["name", "other"], [["n" * 90, "o" * 90]], spare=["other"])
    assert f"{'n' * 90} │ {'o' * 90}" in capsys.readouterr().out


def test_no_licence_is_nothing(place: Path, manyvoice: Command) -> None:
    Store(place).add(voice(3, speaker=None, licence=None), "cleo")
    assert "None" not in manyvoice("voices", place, "ls").stdout


def test_show_is_for_people(place: Path, manyvoice: Command) -> None:
    metrics = {"base_wer": 1.162162162162162, "wer": 0.3783783783783784, "words": 37}
    verified = {"relative_nats": -0.123456789, "interval": [-0.2222222, -0.1111111]}
    card = {"licence": None, "metrics": metrics, "seconds": 69.7400001, "shared": False, "verified": verified}
    Store(place).add(voice(3, **card), "cleo")
    shown = [line.split(maxsplit=1) for line in manyvoice("voices", place, "show", "cleo").stdout.splitlines()]
    assert ["card"] in shown and ["licence", "not stated"] in shown and ["seconds", "69.74"] in shown
    assert ["metrics", "base_wer 116.22%, wer 37.84%, words 37"] in shown and ["shared", "no"] in shown
    assert ["verified", "interval -0.2222 to -0.1111, relative_nats -0.1235"] in shown


def test_a_damaged_voice_is_listed_as_such(place: Path, manyvoice: Command) -> None:
    hash = Store(place).resolve("Ann")
    (place / "default" / "voices" / f"{hash}.safetensors").write_bytes(b"x")
    done = manyvoice("voices", place)
    assert done.returncode == 0 and "damaged: Ann: " in done.stdout and "is no voice file" in done.stdout
    shown = manyvoice("voices", place, "show", "Ann")
    assert shown.returncode == 1 and "is no voice file" in shown.stderr
    assert document(manyvoice("voices", place, "rm", "Ann", "--json"))["removed"][0]["gone"] is True


def test_show(place: Path, manyvoice: Command) -> None:
    shown = document(manyvoice("voices", place, "show", "Ann", "--json"))
    assert shown["hash"] == Store(place).resolve("Ann") and shown["card"]["metrics"] == {"base_wer": 0.25, "wer": 0.125}
    assert (shown["method"], shown["parameters"], shown["tokenizer"]) == ("scale", 50, "d" * 64)
    assert document(manyvoice("voices", place, "show", shown["hash"][:9], "--json"))["hash"] == shown["hash"]
    assert shown["hash"] in manyvoice("voices", place, "show", "Ann").stdout


def test_export_and_add(place: Path, tmp_path: Path, manyvoice: Command) -> None:
    out = tmp_path / "out" / "a.safetensors"
    done = document(manyvoice("voices", place, "export", "Ann", "-o", out, "--json"))
    assert Voice.read(out).hash == done["hash"] and done["file"] == str(out)
    manyvoice("voices", place, "export", "Ann", cwd=tmp_path)
    assert (tmp_path / "=41nn.safetensors").read_bytes() == out.read_bytes()
    sound = tmp_path / "precious.wav"
    sound.write_bytes(b"RIFF")
    refused = manyvoice("voices", place, "export", "Ann", "-o", sound)
    assert refused.returncode == 2 and "precious.wav is there already and holds something else" in refused.stderr
    assert sound.read_bytes() == b"RIFF"
    assert document(manyvoice("voices", place, "export", "Ann", "-o", out, "--json"))["file"] == str(out), "the same"
    other = tmp_path / "other"
    (added,) = document(manyvoice("voices", other, "add", out, "--json"))["added"]
    assert (added["name"], added["hash"], added["replaced"]) == ("Ann", done["hash"], None)
    assert "Zoë: " in manyvoice("voices", other, "add", out, "--name", "Zoë", "--tenant", "clinic").stdout
    assert Store(other).resolve("Zoë", "clinic") == done["hash"]


def test_import_of_many(place: Path, tmp_path: Path, manyvoice: Command) -> None:
    files = [voice(k, **card).write(tmp_path / f"f{k}.safetensors") for k, card in
             ((5, {"speaker": "Ann"}), (6, {}), (7, {"speaker": 3}))]  # fmt: skip
    old = Store(place).resolve("Ann")
    added = document(manyvoice("voices", place, "import", *files, "--json"))["added"]
    assert [(a["name"], a["replaced"]) for a in added] == [("Ann", old), ("f6", None), ("f7", None)]
    twin = voice(8, speaker="f6").write(tmp_path / "twin.safetensors")
    done = manyvoice("voices", place, "import", files[1], twin)
    assert done.returncode == 2 and "would both be called 'f6'" in done.stderr
    twin.write_bytes(b"x")
    new = voice(9, speaker="new").write(tmp_path / "new.safetensors")
    done = manyvoice("voices", place, "import", new, twin)
    assert done.returncode == 1 and "twin.safetensors: is no voice file" in done.stderr
    assert "new" not in [e.name for e in Store(place).entries()], "half imported"


def test_remove(place: Path, manyvoice: Command) -> None:
    done = manyvoice("voices", place, "rm", "bob", "Anne")
    assert done.returncode == 2 and "is it 'Ann'" in done.stderr
    hash = Store(place).resolve("bob")
    done = manyvoice("voices", place, "rm", hash)
    assert done.returncode == 2 and "is a hash; give the name" in done.stderr
    assert len(Store(place).entries()) == 2, "half removed"
    Store(place).add(voice(1, speaker="Ann", licence="CC0-1.0", metrics={"base_wer": 0.25, "wer": 0.125}), "work")
    removed = document(manyvoice("voices", place, "rm", "bob", "Ann", "bob", "--json"))["removed"]
    assert [(r["name"], r["gone"]) for r in removed] == [("bob", True), ("Ann", False)]
    assert removed[0]["hash"] == hash and "trained on this speaker too" in removed[0]["note"]
    assert "another name" in removed[1]["note"] and removed[1]["bytes"] == 0
    text = manyvoice("voices", place, "rm", "work").stdout
    assert text.startswith("work: voice ") and text.strip().endswith("and its name are gone")
    assert document(manyvoice("voices", place, "--json"))["voices"] == []


def test_the_verb_before_the_store_is_put_right(place: Path, manyvoice: Command) -> None:
    done = manyvoice("voices", "show", place)
    assert done.returncode == 2
    assert f"comes first: manyvoice voices {place} show" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    "words,message",
    [
        (["lst"], "voices lst: must be ls, show, add, rm, export, import"),
        (["show"], "voices show: wants a name, but got nothing"),
        (["ls", "x"], "voices ls: wants nothing more, but got x"),
        (["rm"], "voices rm: wants names"),
        (["add", "a", "b"], "`import` takes many files"),
        (["rm", "x", "--name", "y"], "only add takes a name"),
        (["ls", "-o", "y"], "only export writes a file"),
        (["show", "Anne"], "is it 'Ann'"),
        (["ls", "--tenant", " "], "is empty"),
    ],
)
def test_wrong_words(place: Path, manyvoice: Command, words: list[str], message: str) -> None:
    done = manyvoice("voices", place, *words)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr


def test_the_list_is_made_again(place: Path, manyvoice: Command) -> None:
    listed = json.loads(manyvoice("voices", place, "ls", "--json").stdout)["voices"]
    done = manyvoice("voices", place, "rebuild", "--json")
    assert json.loads(done.stdout)["voices"] == {"default": len(listed)}
    assert "the list was made again; " in manyvoice("voices", place, "rebuild").stdout
    assert json.loads(manyvoice("voices", place, "ls", "--json").stdout)["voices"] == listed


def test_where_no_store_is(tmp_path: Path, manyvoice: Command) -> None:
    done = manyvoice("voices", tmp_path / "none", "ls", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "manyvoice personalize" in done.stderr and "add FILE" in done.stderr
    done = manyvoice("voices", tmp_path / "none", "add", tmp_path / "none.safetensors")
    assert done.returncode == 1 and "cannot be read" in done.stderr
    assert list(tmp_path.iterdir()) == []
