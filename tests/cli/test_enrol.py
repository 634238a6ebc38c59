"""From a manifest of speakers to a space, and from a stranger's sound to a voice in a store, at the command line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]


def rows_of(manifest: Path) -> list[dict[str, object]]:
    """With paths that hold anywhere."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    return [row | {"audio_filepath": str(manifest.parent / row["audio_filepath"])} for row in rows]


@pytest.fixture(scope="module")
def speakers(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tones, said to be by five."""
    path = tmp_path_factory.mktemp("speakers") / "manifest.jsonl"
    rows = [row | {"who": f"p{i % 5}"} for i, row in enumerate(rows_of(tones))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def bob(test_tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other tones, said to be all by one."""
    path = tmp_path_factory.mktemp("bob") / "bob.jsonl"
    path.write_text("".join(json.dumps(row | {"speaker": "bob"}) + "\n" for row in rows_of(test_tones)))
    return path


@pytest.fixture(scope="module")
def space(trained: Path, speakers: Path, manyvoice: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space") / "space"
    done = manyvoice("space", trained / "model", speakers, "-o", folder, "--by", "who", "--set", "dim=2", "--set",
                     "rank=2", "--rounds", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folder}/space.safetensors: 5 speakers, 3 numbers a voice")
    assert "explains" in done.stdout
    return folder


def test_sound_becomes_a_voice_that_answers(
    trained: Path, tones: Path, space: Path, manyvoice: Command, tmp_path: Path
) -> None:
    sounds = sorted(tones.parent.glob("*.wav"))[:6]
    store = tmp_path / "voices"
    done = manyvoice("enrol", trained / "model", *sounds, "--space", space, "--name", "ann", "--voices", store)
    assert done.returncode == 0, done.stderr
    assert "nothing was verified" in done.stdout and "stored unverified as ann" in done.stdout
    shown = json.loads(manyvoice("voices", store, "show", "ann", "--json").stdout)
    assert shown["method"] == "adapter" and shown["card"]["made_by"] == "embedding predicted"
    assert shown["card"]["shared"] is True and shown["card"]["seconds"] > 2
    heard = manyvoice("transcribe", trained / "model", sounds[0], "--voice", "ann", "--voices", store, "--json")
    assert heard.returncode == 0, heard.stderr
    assert shown["hash"] in heard.stdout
    again = ("enrol", trained / "model", *sounds[:5], "--space", space, "--name", "ann", "--voices", store, "--json")
    refused = manyvoice(*again)
    assert refused.returncode == 2 and shown["hash"][:12] in refused.stderr and "--replace" in refused.stderr
    replaced = json.loads(manyvoice(*again, "--replace").stdout)
    assert replaced["replaced"] == shown["hash"] != replaced["voice"] and replaced["verified"] is None
    removed = manyvoice("voices", store, "rm", "ann")
    assert removed.returncode == 0 and "does not unlearn" in removed.stdout + removed.stderr


def test_utterances_with_texts_are_compared_with_the_base(
    trained: Path, bob: Path, space: Path, manyvoice: Command, tmp_path: Path
) -> None:
    store = tmp_path / "voices"
    words = (trained / "model", bob, "--space", space, "--name", "bob", "--voices", store)
    done = manyvoice("enrol", *words, "--how", "learn", "--rounds", 2, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["made_by"] == "embedding learned" and said["utterances"] == said["learned"]["units"] == 6
    low, high = said["learned"]["interval"]
    assert low <= said["learned"]["relative"] <= high
    assert (said["voice"] is not None) == (said["learned"]["relative"] < 0) == store.exists()


def test_wrong_words_are_refused(
    trained: Path, tones: Path, test_tones: Path, bob: Path, space: Path, manyvoice: Command, tmp_path: Path
) -> None:
    more = ("--space", space, "--name", "ann", "--voices", tmp_path / "v")
    sound = tones.parent / "0.wav"
    mixed = manyvoice("enrol", trained / "model", test_tones, sound, *more)
    assert mixed.returncode == 2 and "mixes manifests with sound" in mixed.stderr
    learned = manyvoice("enrol", trained / "model", sound, *more, "--how", "learn")
    assert learned.returncode == 2 and "sound alone cannot be learned from" in learned.stderr
    several = manyvoice("enrol", trained / "model", test_tones, *more)
    assert several.returncode == 2 and "2 speakers (s0, s1)" in several.stderr and "personalize" in several.stderr
    nowhere = manyvoice("enrol", trained / "model", bob, *more[2:], "--space", tmp_path)
    assert nowhere.returncode == 1 and "give the folder that `manyvoice space` wrote" in nowhere.stderr
    few = manyvoice("space", trained / "model", tones, "-o", tmp_path / "s")
    assert few.returncode == 2 and "2 speakers with three utterances or more" in few.stderr
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("ann")
    for wrong, message in (
        (("--name", " "), "is empty; give a name"),
        (("--tenant", "T" * 60), "is too long"),
        (("--voices", tmp_path / "letters"), "holds other files"),
    ):
        done = manyvoice("enrol", trained / "model", bob, *more, *wrong)
        said = " ".join(done.stderr.split())
        assert done.returncode == 2 and message in said and "learning" not in said
    assert not (tmp_path / "v").exists() and not (tmp_path / "s").exists()
