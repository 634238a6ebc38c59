"""``manyvoice personalize`` and what uses its voices at the command line: printed, signed, refused, interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from manyvoice.recipes import personalize as recipe
from manyvoice.submodels.store import Store
from manyvoice.submodels.voice import Voice
from manyvoice.train.owners import OwnerTraining

Command = Callable[..., CompletedProcess[str]]
FLAGS = ("--set", "rank=4", "--set", "scale=1", "--rounds", 30, "--lr", 5e-2, "--worse", 1e9, "--licence", "CC0-1.0")


def document(done: CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def done(
    trained: Path, tones: Path, manyvoice: Command, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CompletedProcess[str]]:
    """A run on a base that has hardly learned anything, so that every speaker's voice helps; and what it printed."""
    run = tmp_path_factory.mktemp("voices") / "run"
    return run, manyvoice("personalize", trained / "model", tones, "-o", run, *FLAGS)


@pytest.fixture
def store(done: tuple[Path, CompletedProcess[str]]) -> Path:
    return done[0] / "voices"


def test_it_prints_a_table_and_keeps_markdown(done: tuple[Path, CompletedProcess[str]]) -> None:
    run, printed = done
    assert printed.returncode == 0, printed.stderr
    lines = printed.stdout.splitlines()
    assert lines[0] == "2 of 2 speakers have a voice of their own" and lines[1].startswith("Word error rate, where ")
    assert "│ s0 " in printed.stdout and "|---" not in printed.stdout and "\x1b" not in printed.stdout
    assert lines[-1] == f"{run / 'report.md'} says this too"
    assert (run / "report.md").read_text().startswith(f"# {lines[0]}\n\n{lines[1]}\n\n| speaker | ")
    assert "training: 30 of 30" in printed.stderr and "2 speakers, s0, s1" in printed.stderr
    assert {p.name for p in run.iterdir()} == {
        "personalize.json", "split.json", "speakers.jsonl", "report.json", "report.md", "voices",
    }  # fmt: skip


def test_the_same_command_again_trains_nothing(
    done: tuple[Path, CompletedProcess[str]], trained: Path, tones: Path, manyvoice: Command, monkeypatch: Any
) -> None:
    run, _ = done
    monkeypatch.setattr(recipe, "OwnerTraining", None)
    again = document(manyvoice("personalize", trained / "model", tones, "-o", run, *FLAGS, "--json"))
    assert again == json.loads((run / "report.json").read_text())
    other = manyvoice("personalize", trained / "model", tones, "-o", run, *FLAGS, "--seed", 1)
    assert (other.returncode, other.stdout) == (2, "") and "choose another --output" in other.stderr


def test_evaluate_with_the_store_is_what_was_reported(
    done: tuple[Path, CompletedProcess[str]],
    trained: Path,
    tones: Path,
    store: Path,
    tmp_path: Path,
    manyvoice: Command,
) -> None:
    split = json.loads((done[0] / "split.json").read_text())
    rows = [json.loads(line) for line in tones.read_text().splitlines()]
    reported = {row["speaker"]: row for row in json.loads((done[0] / "report.json").read_text())["speakers"]}
    for speaker, parts in split.items():
        test = [
            row | {"audio_filepath": str(tones.parent / row["audio_filepath"]), "id": id}
            for id in parts["test"]
            for row in rows
            if Path(row["audio_filepath"]).stem == Path(id).stem
        ]
        manifest = tmp_path / f"{speaker}.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in test))
        found = document(manyvoice("evaluate", trained / "model", manifest, "--voices", store, "--json"))
        assert found["wer"] == reported[speaker]["wer_after"] and found["cer"] == reported[speaker]["cer_after"]
        # the words of a base that hardly says any are the same with the voice; its losses are not
        assert found["loss_per_character"] == pytest.approx(reported[speaker]["loss_after"], rel=1e-3)
        assert found["voices"]["base"] == 0 and found["word_counts"]["reference"] == reported[speaker]["words"]
        (receipt,) = found["voices"]["voices"].values()
        assert (receipt["hash"], receipt["utterances"]) == (reported[speaker]["voice"], len(test))
        bare = document(manyvoice("evaluate", trained / "model", manifest, "--json"))
        assert bare["wer"] == reported[speaker]["wer_before"] and "voices" not in bare
        assert bare["loss_per_character"] == pytest.approx(reported[speaker]["loss_before"], rel=1e-3)
        assert found["loss"] < 0.9 * bare["loss"]
    text = manyvoice("evaluate", trained / "model", tones, "--voices", store).stdout
    assert "24 utterances with 2 voices of their speakers, 0 with the bare base" in text


def test_a_transcript_is_signed_by_the_file_wherever_it_lies(
    trained: Path, test_tones: Path, store: Path, tmp_path: Path, manyvoice: Command
) -> None:
    sound = test_tones.parent / "0.wav"
    file = tmp_path / "s0.safetensors"
    assert manyvoice("voices", store, "export", "s0", "-o", file).returncode == 0
    copied = Path(shutil.copy(file, tmp_path / "renamed"))
    words = ("transcribe", trained / "model", sound, "--json")
    found = [document(manyvoice(*words, "--voice", path))["transcripts"] for path in (file, copied)]
    found.append(document(manyvoice(*words, "--voice", "s0", "--voices", store))["transcripts"])
    assert found[0] == found[1] == found[2]
    receipt = found[0][0]["receipt"]
    assert (receipt["voice"], receipt["hash"], receipt["method"]) == ("s0", Store(store).resolve("s0"), "adapter")
    assert receipt["base"] == Voice.read(file).base and receipt["sites_ran"] and not receipt["sites_dropped"]
    bare = document(manyvoice(*words))["transcripts"]
    signed = bare[0]["receipt"]
    assert signed["base"] == receipt["base"] and signed["voice"] is signed["hash"] is signed["size"] is None
    lines = manyvoice("transcribe", trained / "model", sound, "--format", "jsonl", "--voice", file).stdout
    assert json.loads(lines)["receipt"] == receipt


def test_voices_that_cannot_answer(
    trained: Path, test_tones: Path, store: Path, tmp_path: Path, manyvoice: Command
) -> None:
    def refused(*flags: object) -> tuple[int, str]:
        found = []
        for words in (
            ("transcribe", trained / "model", test_tones.parent / "0.wav"),
            ("evaluate", trained / "model", test_tones),
        ):
            done = manyvoice(*words, *flags, "--json")
            assert done.stdout == "" and "Traceback" not in done.stderr
            found.append((done.returncode, done.stderr))
        assert found[0] == found[1]
        return found[0]

    status, said = refused("--voice", "s00", "--voices", store)
    assert status == 2 and "is it 's0'" in said
    status, said = refused("--voice", "s0")
    assert status == 2 and "give a voice file, or a name with --voices STORE" in said
    status, said = refused("--voice", "s0", "--voices", tmp_path / "nowhere")
    assert status == 2 and "manyvoice personalize" in said
    voice = Store(store).get("s0")
    foreign = replace(voice, base="0" * 64).write(tmp_path / "foreign.safetensors")
    status, said = refused("--voice", foreign)
    assert status == 1 and "was made for the base 000000000000" in said
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(voice.data[: len(voice.data) // 2])
    status, said = refused("--voice", cut)
    assert status == 1 and "cut.safetensors: is no voice" in said
    done = manyvoice("transcribe", trained / "model", test_tones, "--voices", store)
    assert done.returncode == 2 and "say whose with --voice NAME" in done.stderr


def test_interrupted_it_says_so_and_goes_on_the_next_time(
    done: tuple[Path, CompletedProcess[str]], trained: Path, tones: Path, tmp_path: Path, manyvoice: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = ("personalize", trained / "model", tones, "-o", tmp_path / "run", *FLAGS, "--memory", "0.15MiB", "--json")
    run, trainings = OwnerTraining.run, []

    def interrupted(self: OwnerTraining, progress: Any = None, halfway: Any = None) -> Any:
        trainings.append(self.bank.owners)
        if len(trainings) == 2:
            raise KeyboardInterrupt
        return run(self, progress, halfway)

    monkeypatch.setattr(OwnerTraining, "run", interrupted)
    stopped = manyvoice(*words)
    assert (stopped.returncode, stopped.stdout) == (1, "")
    assert stopped.stderr.splitlines()[-1].startswith("manyvoice: stopped; the same command goes on")
    assert not (tmp_path / "run" / "report.json").exists()
    found = document(manyvoice(*words))
    assert trainings == [("s0",), ("s1",), ("s1",)]
    whole = json.loads((done[0] / "report.json").read_text())
    assert [(o["speaker"], o["kept"], o["wer_after"]) for o in found["speakers"]] == [
        (o["speaker"], o["kept"], o["wer_after"]) for o in whole["speakers"]
    ]


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--set", "rank"), "--set rank: must look like rank=8"),
        (("--set", "depth=8"), "method adapter: no setting depth"),
        (("--method", "lst"), "method 'lst': there are adapter"),
        (("--choose", 0), "split.choose = 0.0: must be a share between 0 and 1"),
        (("--adapt", 0), "split.adapt = 0: must be 1 or more"),
        (("--memory", "1KiB"), "do not hold s0's speech and submodel"),
        (("--lr", 0.1, "--lr", 0.1), "must be above 0 and no two the same"),
        (("--sizes",), "has no sizes to train across"),
        (("--rounds", 0), "schedule.rounds = 0: must be 1 or more"),
    ],
)
def test_wrong_words(
    flags: tuple[object, ...], message: str, trained: Path, tones: Path, tmp_path: Path, manyvoice: Command
) -> None:
    done = manyvoice("personalize", trained / "model", tones, "-o", tmp_path / "run", *flags)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr


def test_a_dry_run_shows_the_plan(trained: Path, tones: Path, tmp_path: Path, manyvoice: Command) -> None:
    words = ("personalize", trained / "model", tones, "-o", tmp_path / "run", "--by", "age", "--dry-run")
    shown = manyvoice(*words)
    assert shown.stdout.startswith("2 of 2 speakers have enough speech for a voice\nNothing was trained or written.\n")
    assert "│ 10 " in shown.stdout and "report.md" not in shown.stdout and not (tmp_path / "run").exists()
    assert document(manyvoice(*words, "--json"))["planned"] == {"10": [6, 2, 4], "30": [6, 2, 4]}


def test_names_are_not_taken_for_markup(trained: Path, tones: Path, tmp_path: Path, manyvoice: Command) -> None:
    rows = [json.loads(line) for line in tones.read_text().splitlines()]
    for row in rows:
        row |= {"audio_filepath": str(tones.parent / row["audio_filepath"]), "speaker": "[/red]x\x1b[2J"}
    manifest = tmp_path / "odd.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = manyvoice("personalize", trained / "model", manifest, "-o", tmp_path / "run", "--dry-run")
    assert shown.returncode == 0 and "[/red]x\\x1b[2J" in shown.stdout and "\x1b" not in shown.stdout
