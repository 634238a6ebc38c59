"""Outputs of transcripts go on where they stopped, with the same weights only, and foreign files are left alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from manyvoice.errors import UsageError, VoiceError
from manyvoice.recipes.sizes import load_size
from manyvoice.recipes.transcribe import RECEIPT, Form, Output, Recording, Transcript, Weights, transcribe_all
from manyvoice.recipes.voiced import load_bare, with_receipts
from manyvoice.types import Seconds

ANN = Weights(base="a" * 64, size=None, hash="1" * 64, voice="ann")
OTHERS = {
    "voice": replace(ANN, hash="2" * 64, voice="bob"),
    "replaced under its name": replace(ANN, hash="2" * 64),
    "no voice": replace(ANN, hash=None, voice=None),
    "size": replace(ANN, size="40"),
    "base": replace(ANN, base="b" * 64),
}
NAMES = ["x.wav", "line\u2028separator\x85.wav", "z.wav"]


def recording(name: str) -> Recording:
    return Recording(name, lambda rate: np.zeros(rate, np.float32))


def signed(name: str, weights: Weights | None = ANN, text: str = "so\u2028it\x85is\u2029said") -> Transcript:
    receipt: Mapping[str, object] | None = None if weights is None else vars(weights) | {"tenant": "default"}
    return Transcript(id=name, text=text, words=(), seconds=Seconds(1.0), receipt=receipt)


def left(output: Output) -> list[str]:
    return [one.id for one in output.pending(map(recording, NAMES))]


def begun(path: Path, form: Form = "jsonl", weights: Weights = ANN, count: int = 2) -> Output:
    """An output with some transcripts in it."""
    output = Output(path=path, form=form, weights=weights)
    assert left(output) == NAMES
    for name in NAMES[:count]:
        output.store(signed(name, weights))
    return output


@pytest.mark.parametrize(("name", "form"), [("o.jsonl", "jsonl"), ("o", "jsonl"), ("o", "srt"), ("o", "text")])
@pytest.mark.parametrize("other", sorted(OTHERS))
def test_only_the_same_weights_go_on(tmp_path: Path, name: str, form: Form, other: str) -> None:
    output = begun(tmp_path / name, form)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert left(output) == NAMES[2:]
    assert left(replace(output, weights=replace(ANN, voice="also ann"))) == NAMES[2:]
    said = (
        rf"--output .*{name}.*: was made with base a{{12}}, the whole model, the voice ann \(1{{12}}\); asked for now"
    )
    with pytest.raises(UsageError, match=said + r" is .*; name another --output, or delete this one"):
        left(replace(output, weights=OTHERS[other]))
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("name", "ids"), [("o.jsonl", ["0", "0"]), ("o", ["0", "0"]), ("o", ["x/y.wav", "x_y.wav"])])
def test_two_recordings_that_would_be_one_are_refused(tmp_path: Path, name: str, ids: list[str]) -> None:
    output = Output(path=tmp_path / name, form="jsonl", weights=ANN)
    with pytest.raises(UsageError, match=rf"--output .*{name}: {ids[0]} and {ids[1]} are both .* would be lost"):
        list(output.pending(map(recording, ids)))


def test_lines_end_where_json_lines_do(tmp_path: Path) -> None:
    """Not at what Unicode calls an end of line, which strings of JSON may hold; and a cut may go through a letter."""
    output = begun(tmp_path / "o.jsonl")
    whole = output.path.read_bytes()
    assert "\u2028".encode() in whole
    cut = signed("z.wav").render("jsonl").encode()
    for stop in (3, 12, cut.index("\u2028".encode()) + 1, len(cut) - 1):
        output.path.write_bytes(whole + cut[:stop])
        assert left(output) == NAMES[2:]
        assert output.path.read_bytes() == whole


def test_outputs_of_nobody_knows_what_are_refused_and_stay(tmp_path: Path) -> None:
    output = Output(path=tmp_path / "o.jsonl", form="jsonl", weights=ANN)
    row = signed("x.wav").as_dict()
    older = {k: v for k, v in row.items() if k != "receipt"}
    for line, match in (
        (json.dumps(older) + "\n", "line 1: has no receipt"),
        (json.dumps(older | {"text": ""}) + "\n", "line 1: has no receipt"),
        (json.dumps(row | {"receipt": None}) + "\n", "line 1: has no receipt"),
        (json.dumps(row | {"receipt": vars(ANN) | {"base": 3}}) + "\n", "line 1: has no receipt"),
        ('{"audio_filepath": "a.wav"}\n', "line 1: has no receipt"),
        (signed("x.wav").render("jsonl") + "\nno JSON\n", "line 2: has no receipt"),
        ("a line of somebody's", "line 1: is no transcript"),
    ):
        output.path.write_text(line, encoding="utf-8")
        with pytest.raises(UsageError, match=match):
            left(output)
        assert output.path.read_text(encoding="utf-8") == line
    folder = begun(tmp_path / "folder", "vtt")
    for note in (None, "[]", "no JSON", '{"base": 1}'):
        (folder.path / RECEIPT).unlink(missing_ok=True)
        if note is not None:
            (folder.path / RECEIPT).write_text(note)
        with pytest.raises(UsageError, match=r"folder: holds .*\.vtt, but no receipt\.json that says which weights"):
            left(replace(folder, form="srt"))


def test_a_folder_is_whose_words_it_holds(tmp_path: Path) -> None:
    """Begun without a single transcript written, it is nobody's yet."""
    begun(tmp_path, "srt", count=0)
    bob = begun(tmp_path, "srt", OTHERS["voice"], count=1)
    assert Weights.of(json.loads((tmp_path / RECEIPT).read_text())) == bob.weights
    assert left(bob) == NAMES[1:]


def test_where_nothing_ran_no_weights_matter(tmp_path: Path) -> None:
    output = begun(tmp_path / "o.jsonl", count=0)
    output.store(signed("x.wav", None, text=""))
    assert json.loads(output.path.read_text())["receipt"] is None
    assert left(output) == left(replace(output, weights=OTHERS["voice"])) == NAMES[1:]


def test_a_voice_replaced_between_two_recordings_is_an_error(tmp_path: Path) -> None:
    output = begun(tmp_path / "o.jsonl", count=1)
    whole = output.path.read_text(encoding="utf-8")
    with pytest.raises(VoiceError, match=r"z.wav: was made with .*2{12}.* replaced meanwhile; run it again"):
        output.store(signed("z.wav", OTHERS["replaced under its name"]))
    assert output.path.read_text(encoding="utf-8") == whole


@pytest.mark.parametrize("size", [None, "40"])
def test_the_bare_base_signs_what_it_says(base: Path, size: str | None) -> None:
    t_N = np.arange(12_000) / 16_000
    tone_N = (0.3 * np.sin(2 * np.pi * 900 * t_N)).astype(np.float32)
    sounds = [Recording("talk", lambda rate: tone_N), Recording("click", lambda rate: tone_N[:800])]
    voiced = load_bare(base, size=size)
    found = list(with_receipts(voiced, transcribe_all(voiced.recogniser(None), sounds)))
    unsigned = list(transcribe_all(load_size(base, size), sounds))
    assert [replace(one, receipt=None) for one in found] == unsigned
    assert (found[0].text or size) and found[0].receipt is not None and found[1].receipt is None
    assert Weights.of(found[0].receipt) == voiced.weights(None)
    assert (found[0].receipt["base"], found[0].receipt["size"]) == (load_size(base, None).fingerprint(), size)
    with pytest.raises(UsageError, match="voice 'ann': the model was loaded without voices"):
        voiced.weights("ann")
