from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from manyvoice.data import synth
from manyvoice.data.espeak import Engine
from manyvoice.data.synth import NOISES, SynthSpec, add_noise, reverberate, synthesise, synthesise_splits
from manyvoice.errors import SynthesisError, UsageError, WorkError

HAS_PROGRAM = shutil.which("espeak-ng") is not None
try:
    import espeakng_loader  # noqa: F401

    HAS_LIBRARY = hasattr(os, "fork")
except ImportError:
    HAS_LIBRARY = False
pytestmark = pytest.mark.skipif(not (HAS_PROGRAM or HAS_LIBRARY), reason="espeak-ng is not installed")

EVERYTHING = SynthSpec(
    utterances=9,
    speakers=6,
    words=(1, 4),
    dialects=("en-gb", "cmn", "hak", "yue", "en-029"),
    atypical=3,
    noise=0.7,
    room=0.7,
    seed=11,
)


def rows_of(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "everything"
    synthesise(EVERYTHING, out)
    return out


def test_a_corpus_is_the_same_byte_for_byte_with_any_number_of_jobs(everything: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    synthesise(EVERYTHING, tmp_path / "again", jobs=2, progress=lambda done, total: seen.append((done, total)))
    assert bytes_of(tmp_path / "again") == bytes_of(everything)
    assert seen[-1] == (9, 9)
    assert os.listdir(tmp_path) == ["again"]


@pytest.mark.skipif(not (HAS_PROGRAM and HAS_LIBRARY), reason="needs the program and the library of espeak-ng")
def test_the_library_speaks_the_same_plan_and_says_so(everything: Path, tmp_path: Path) -> None:
    spec = SynthSpec(utterances=3, words=(1, 3), engine="library")
    out = synthesise(spec, tmp_path / "a").parent
    assert json.loads((out / "corpus.json").read_text())["engine"]["kind"] == "library"
    synthesise(spec, tmp_path / "b")
    assert bytes_of(tmp_path / "b") == bytes_of(out)
    by_program = rows_of(synthesise(SynthSpec(utterances=3, words=(1, 3), engine="program"), tmp_path / "c"))
    assert [row["text"] for row in by_program] == [row["text"] for row in rows_of(out / "manifest.jsonl")]


def test_rows_say_what_the_files_hold(everything: Path) -> None:
    rows = rows_of(everything / "manifest.jsonl")
    assert len(rows) == 9 and len({row["id"] for row in rows}) == 9
    assert {row["language"] for row in rows} == {"en", "cmn", "hak", "yue"}
    for row in rows:
        audio, hertz = soundfile.read(everything / row["audio_filepath"], dtype="int16")
        assert hertz == 16_000 and audio.ndim == 1 and row["audio_filepath"].endswith(".flac")
        assert row["duration"] == pytest.approx(len(audio) / hertz, abs=1e-6) and row["duration"] > 0.3
        assert Path(row["audio_filepath"]).parent.name == row["speaker"]
        assert 500 < np.abs(audio.astype(int)).max() <= 32_450
        assert row["voice"].count("+") == 1 and row["dialect"] in EVERYTHING.dialects
    assert any("room" in row for row in rows) and any("noise_snr_db" in row for row in rows)
    assert all(5 <= row["noise_snr_db"] <= 20 and row["noise"] in NOISES for row in rows if "noise" in row)


def test_atypical_speakers_are_marked_as_simulated(everything: Path) -> None:
    rows = rows_of(everything / "manifest.jsonl")
    marked = {row["speaker"] for row in rows if row.get("simulated")}
    assert len(marked) == 3
    for row in rows:
        assert (row["speaker"] in marked) == ("atypical" in row)
        if "atypical" in row:
            assert row["atypical"]["substitutions"] and row["atypical"]["rate"] <= 120
    one = next(row["speaker"] for row in rows if row.get("simulated"))
    assert len({json.dumps(row["atypical"]) for row in rows if row["speaker"] == one}) == 1


def test_the_corpus_says_how_it_was_made(everything: Path) -> None:
    said = json.loads((everything / "corpus.json").read_text(encoding="utf-8"))
    assert said["seed"] == 11 and said["spec"]["words"] == [1, 4] and said["utterances"] == 9
    assert said["engine"]["name"] == "espeak-ng" and said["engine"]["version"][0].isdigit()
    assert "GPL-3.0" in said["licence"] and set(said["libraries"]) >= {"numpy", "soxr", "libsndfile"}
    assert {speaker["name"] for speaker in said["speakers"]} == {
        row["speaker"] for row in rows_of(everything / "manifest.jsonl")
    }
    assert said["seconds"] == pytest.approx(sum(row["duration"] for row in rows_of(everything / "manifest.jsonl")))


def test_another_seed_is_another_corpus(everything: Path, tmp_path: Path) -> None:
    spec = SynthSpec(utterances=3, speakers=3, words=(1, 3), seed=12)
    rows = rows_of(synthesise(spec, tmp_path / "out"))
    assert not {row["speaker"] for row in rows} & {row["speaker"] for row in rows_of(everything / "manifest.jsonl")}


def test_sentences_come_from_a_text_file_and_no_path_is_kept(tmp_path: Path) -> None:
    text = tmp_path / "phrases.txt"
    text.write_text("good morning\nit's a fine day\nan aardvark\n")
    spec = SynthSpec(utterances=4, speakers=2, grammar="sentences", text=text, words=(2, 4), format="wav")
    out = synthesise(spec, tmp_path / "out").parent
    rows = rows_of(out / "manifest.jsonl")
    assert {row["text"] for row in rows} == {"good morning", "it's a fine day", "an aardvark"}
    assert all(soundfile.info(out / row["audio_filepath"]).format == "WAV" for row in rows)
    said = (out / "corpus.json").read_text()
    assert json.loads(said)["spec"]["text"]["name"] == "phrases.txt" and str(tmp_path) not in said


@pytest.mark.parametrize("held_out", [False, True])
def test_splits_share_no_phrase_and_speakers_only_if_they_may(tmp_path: Path, held_out: bool) -> None:
    spec = SynthSpec(utterances=14, speakers=4, words=(1, 4), atypical=1, grammar="digits")
    shares = {"train": 0.6, "dev": 0.2, "test": 0.2}
    paths = synthesise_splits(spec, tmp_path / "out", shares, held_out_speakers=held_out)
    rows = {name: rows_of(path) for name, path in paths.items()}
    assert {name: len(split) for name, split in rows.items()} == {"train": 8, "dev": 3, "test": 3}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not {row["text"] for row in rows[one]} & {row["text"] for row in rows[other]}
        shared = {row["speaker"] for row in rows[one]} & {row["speaker"] for row in rows[other]}
        assert bool(shared) != held_out
    assert len({row["id"] for split in rows.values() for row in split}) == 14
    assert json.loads((tmp_path / "out" / "dev" / "corpus.json").read_text())["split"] == "dev"
    with pytest.raises(UsageError, match="overwrite=True"):
        synthesise_splits(spec, tmp_path / "out", shares)


@pytest.mark.parametrize(
    ("shares", "match"),
    [
        ({"train": 0.8, "dev": 0.1}, r"shares must be above 0 and sum to 1, but sum to 0\.9"),
        ({}, "sum to 1"),
        ({"train": 0.99, "dev": 0.01}, "utterances = 10: nothing is left for dev; ask for more"),
        ({"../train": 1.0}, "names become folders"),
    ],
)
def test_shares_that_cannot_be_are_refused(tmp_path: Path, shares: dict[str, float], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        synthesise_splits(SynthSpec(utterances=10), tmp_path / "out", shares)
    assert not list(tmp_path.iterdir())


def test_a_complete_corpus_is_replaced_only_on_purpose(tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = SynthSpec(utterances=1, speakers=1, words=(1, 3))
    synthesise(small, out)
    before = bytes_of(out)
    with pytest.raises(UsageError, match="use it, or replace it with --overwrite, which in Python is overwrite=True"):
        synthesise(small, out)
    assert bytes_of(out) == before
    synthesise(SynthSpec(utterances=1, speakers=1, words=(1, 3), seed=1), out, overwrite=True)
    assert not set(bytes_of(out)) & (set(before) - {"manifest.jsonl", "corpus.json"})
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files that are no corpus"):
        synthesise(SynthSpec(utterances=1), tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="is a file; name a folder"):
        synthesise(SynthSpec(utterances=1), tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match="file/out': cannot be made"):
        synthesise(SynthSpec(utterances=1), tmp_path / "file" / "out")


def test_a_run_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_at_two(task: synth._Task, *rest: object) -> dict[str, Any]:
        if task.index == 2:
            raise SynthesisError("the voice is gone")
        return speak(task, *rest)  # type: ignore[arg-type]

    speak = synth._speak
    monkeypatch.setattr(synth, "_speak", fail_at_two)
    spec = SynthSpec(utterances=4, speakers=1, words=(1, 3))
    with pytest.raises(SynthesisError, match="the voice is gone"):
        synthesise(spec, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half.flac").touch()
    out = synthesise(SynthSpec(utterances=1, speakers=1, words=(1, 3)), tmp_path / "out").parent
    assert "half.flac" not in os.listdir(out) and os.listdir(tmp_path) == ["out"]


def test_a_missing_variant_stops_the_run_before_anything_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Engine, voice: str) -> None:
        raise SynthesisError(f"no {voice}")

    monkeypatch.setattr(Engine, "require", refuse)
    with pytest.raises(SynthesisError, match="no gmw/en"):
        synthesise(SynthSpec(utterances=1), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"utterances": 0}, "utterances = 0: at least one"),
        ({"speakers": 0}, "speakers = 0"),
        ({"grammar": "poems"}, "grammar = 'poems': unknown; use one of digits, commands, sentences"),
        ({"grammar": "sentences"}, "text = None: grammar 'sentences' needs a text file"),
        ({"text": Path("a.txt")}, "grammar 'commands' takes no text file"),
        ({"words": (3, 2)}, r"words = \(3, 2\): 1 <= shortest <= longest"),
        ({"words": (0, 2)}, r"words = \(0, 2\)"),
        ({"vocabulary": 100}, "vocabulary = 100: 1 or more, with sentences only"),
        ({"dialects": ("en-gb", "en-mars")}, "dialects = .*unknown|dialects = .*known and no two the same"),
        ({"dialects": ()}, r"dialects = \(\)"),
        ({"grammar": "sentences", "text": Path("a"), "dialects": ("hak",)}, "which espeak-ng reads"),
        ({"grammar": "sentences", "text": Path("a"), "dialects": ("en-gb", "cmn")}, "in one language"),
        ({"speakers": 2, "atypical": 3}, "atypical = 3: 0 to 2 speakers; lower it"),
        ({"noise": 1.5}, "noise = 1.5: a probability; use 0 to 1"),
        ({"snr_db": (20.0, 5.0)}, r"snr_db = \(20.0, 5.0\)"),
        ({"room": -0.1}, "room = -0.1"),
        ({"format": "mp3"}, "format = 'mp3': unknown; use one of flac, wav"),
        ({"engine": "festival"}, "engine = 'festival'"),
    ],
)
def test_a_field_out_of_range_is_named(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        SynthSpec(**{"utterances": 10, **settings})


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(UsageError, match=r"utterances = 0.*; noise = 2"):
        SynthSpec(utterances=0, noise=2)


def test_jobs_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="jobs = 0: at least one process"):
        synthesise(SynthSpec(utterances=1), tmp_path / "out", jobs=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", NOISES)
def test_noise_has_the_asked_level(kind: str) -> None:
    audio = np.sin(np.arange(12_345) * 0.1)
    noisy = add_noise(audio, kind, 7.5, np.random.default_rng(0))
    ratio = np.sum(audio**2) / np.sum((noisy - audio) ** 2)
    assert 10 * np.log10(ratio) == pytest.approx(7.5)


def test_kinds_of_noise_have_their_slopes() -> None:
    def low_share(kind: str) -> float:
        noise = add_noise(np.full(16_000, 1e-3), kind, -60.0, np.random.default_rng(0))
        power = np.abs(np.fft.rfft(noise)) ** 2
        return float(power[50:1000].sum() / power[50:].sum())

    assert low_share("white") < 0.2 < low_share("pink") < low_share("babble")


def test_a_room_keeps_the_direct_path_and_decays_by_60_db() -> None:
    click = np.zeros(16_000)
    click[100] = 1.0
    heard = reverberate(click, 0.4, 6.0, np.random.default_rng(0))
    assert len(heard) == len(click) and heard[100] == pytest.approx(1.0)
    assert np.abs(heard[:100]).max() < 1e-9 and np.abs(heard[101:139]).max() < 1e-9
    tail = heard[101:]
    assert 10 * np.log10(1 / np.sum(tail**2)) == pytest.approx(6.0, abs=1e-6)
    early, late = np.sum(tail[100:900] ** 2), np.sum(tail[3300:4100] ** 2)
    assert 10 * np.log10(early / late) == pytest.approx(60 * 0.2 / 0.4, abs=2.0)
