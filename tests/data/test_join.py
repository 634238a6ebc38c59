from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from manyvoice.data.join import join_clips, noise_floor
from manyvoice.data.manifest import open_corpus
from manyvoice.data.utterance import ArrayAudio, FileAudio, Utterance
from manyvoice.errors import AudioError, CorpusError
from manyvoice.types import Seconds

RATE = 8000
WORDS = ("zero", "one", "two", "three", "four", "five")
NO_GAP = (Seconds(0.0), Seconds(0.0))


def clip(speaker: str, k: int, *, rate: int = RATE, floor: float = 0.001, **fields: object) -> Utterance:
    """20 to 25 ms that no other clip has, a tone in a noise; 16-bit values, as a file would give."""
    gen = np.random.default_rng([len(speaker), ord(speaker[0]), k])
    samples = rate // 50 + k * rate // 1000
    x_N = floor * gen.standard_normal(samples) + 0.3 * np.sin(np.arange(samples) * (0.1 + 0.05 * k))
    audio = ArrayAudio((np.rint(x_N * 32768) / 32768).astype(np.float32), rate)
    fields = {"text": WORDS[k % 6], "speaker": speaker, "extra": {"gender": "m", "word": k}, **fields}
    return Utterance(id=f"{speaker}-{k}", audio=audio, duration=Seconds(samples / rate), **fields)


def corpus(**sizes: int) -> list[Utterance]:
    return [clip(speaker, k) for speaker, size in sizes.items() for k in range(size)]


def rows_of(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@given(low=st.integers(1, 3), more=st.integers(0, 3), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_strings_are_clips_of_one_speaker_in_the_order_of_the_text(low, more, seed, tmp_path_factory):
    rows = corpus(ann=6, ben=7)
    by_id = {row.id: row for row in rows}
    out = tmp_path_factory.mktemp("join") / "strings"
    gap = (Seconds(0.0), Seconds(0.01))
    for row in rows_of(join_clips(rows, out, strings=5, clips=(low, low + more), gap=gap, seed=seed)):
        chosen = [by_id[id] for id in row["clips"]]
        assert low <= len(chosen) <= low + more and len(set(row["clips"])) == len(chosen)
        assert {clip.speaker for clip in chosen} == {row["speaker"]}
        assert row["text"] == " ".join(clip.text for clip in chosen)
        info = soundfile.info(str(out / row["audio_filepath"]))
        assert (info.samplerate, info.format, info.subtype) == (RATE, "FLAC", "PCM_16")
        assert row["duration"] == pytest.approx(info.duration, abs=1e-4)
        spoken = sum(clip.duration for clip in chosen)
        assert spoken - 1e-3 <= row["duration"] <= spoken + 0.01 * (len(chosen) - 1) + 1e-3


def test_the_samples_of_the_clips_are_not_changed(tmp_path):
    rows = corpus(ann=5)
    by_id = {row.id: row for row in rows}
    for row in rows_of(join_clips(rows, tmp_path / "out", strings=4, clips=4, gap=NO_GAP)):
        joined_N, _ = soundfile.read(tmp_path / "out" / row["audio_filepath"], dtype="float32")
        assert np.array_equal(joined_N, np.concatenate([by_id[id].audio.read(RATE) for id in row["clips"]]))


def test_the_seed_decides_and_more_strings_continue_the_same_list(tmp_path):
    rows = corpus(ann=6, ben=6, cem=9)
    once, again, other = tmp_path / "once" / "s", tmp_path / "again" / "s", tmp_path / "other" / "s"
    join_clips(rows, once, strings=6, clips=(2, 4), seed=3)
    join_clips(rows[::-1], again, strings=6, clips=(2, 4), seed=3)
    join_clips(rows, other, strings=6, clips=(2, 4), seed=4)
    assert contents(once) == contents(again) and contents(once) != contents(other)
    longer = tmp_path / "longer" / "s"
    join_clips(rows, longer, strings=9, clips=(2, 4), seed=3)
    assert rows_of(longer / "manifest.jsonl")[:6] == rows_of(once / "manifest.jsonl")
    assert contents(once)["audio/000005.flac"] == contents(longer)["audio/000005.flac"]


def test_gaps_hold_noise_at_the_floor_of_the_clips_and_silence_beside_silence(tmp_path):
    gap = (Seconds(0.5), Seconds(0.5))
    quiet_N = (np.rint(np.random.default_rng(0).normal(0, 0.01, RATE) * 32768) / 32768).astype(np.float32)
    noisy = [
        Utterance(id=f"{k}", audio=ArrayAudio(quiet_N, RATE), duration=Seconds(1.0), text="a", speaker="s")
        for k in (0, 1)
    ]
    join_clips(noisy, tmp_path / "noisy", strings=1, clips=2, gap=gap)
    joined_N, _ = soundfile.read(tmp_path / "noisy" / "audio" / "000000.flac", dtype="float32")
    assert len(joined_N) == 2 * RATE + RATE // 2
    assert np.std(joined_N[RATE : RATE + RATE // 2]) == pytest.approx(noise_floor(quiet_N, RATE), rel=0.05)
    zeros = [
        Utterance(
            id=f"{k}", audio=ArrayAudio(np.zeros(400, np.float32), RATE), duration=Seconds(0.05), text="a", speaker="s"
        )
        for k in (0, 1)
    ]
    join_clips(zeros, tmp_path / "zeros", strings=1, clips=2, gap=gap)
    joined_N, _ = soundfile.read(tmp_path / "zeros" / "audio" / "000000.flac", dtype="float32")
    assert len(joined_N) == 800 + RATE // 2 and not joined_N.any()


def test_the_noise_floor_is_that_of_the_quiet_frames():
    speech_N = np.concatenate([np.full(RATE, 0.5), np.full(RATE // 5, 0.01)]).astype(np.float32)
    assert noise_floor(speech_N, RATE) == pytest.approx(0.01, rel=1e-3)
    assert noise_floor(speech_N[:3], RATE) == pytest.approx(0.5)


def test_every_speaker_gets_as_many_strings_or_a_share_of_them(tmp_path):
    rows = corpus(ann=4, ben=4, cem=40)
    equal = rows_of(join_clips(rows, tmp_path / "equal", strings=31, clips=2, gap=NO_GAP))
    assert sorted(Counter(row["speaker"] for row in equal).values()) == [10, 10, 11]
    share = rows_of(join_clips(rows, tmp_path / "share", strings=60, clips=2, gap=NO_GAP, balance="clip"))
    assert Counter(row["speaker"] for row in share)["cem"] > 40


def test_what_all_clips_agree_on_is_kept(tmp_path):
    rows = [clip("ann", k, label="north", language="en") for k in range(3)]
    (row,) = rows_of(join_clips(rows, tmp_path / "out", strings=1, clips=3))
    assert row["gender"] == "m" and row["label"] == "north" and row["language"] == "en" and "word" not in row
    assert row["id"] == "out-000000"


def test_clips_can_be_joined_by_another_column(tmp_path):
    rows = [clip(s, k, label="north" if k % 2 else "south") for s in ("ann", "ben") for k in range(4)]
    by_id = {row.id: row for row in rows}
    joined = rows_of(join_clips(rows, tmp_path / "out", strings=8, clips=4, gap=NO_GAP, by="label"))
    assert all({by_id[id].label for id in row["clips"]} == {row["label"]} for row in joined)
    assert any("speaker" not in row for row in joined), "the clips of two speakers have no speaker together"
    by_gender = join_clips(rows, tmp_path / "g", strings=1, clips=8, by="gender")
    assert rows_of(by_gender)[0]["gender"] == "m"


def test_a_manifest_goes_in_and_a_manifest_comes_out(tmp_path):
    for k in range(3):
        soundfile.write(tmp_path / f"{k}.wav", clip("ann", k).audio.read(RATE), RATE)
    lines = [{"audio_filepath": f"{k}.wav", "text": WORDS[k], "speaker": "ann", "accent": "x"} for k in range(3)]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (joined,) = open_corpus(join_clips(tmp_path / "clips.jsonl", tmp_path / "out", strings=1, clips=3))
    assert sorted(joined.text.split()) == ["one", "two", "zero"] and joined.speaker == "ann"
    assert sorted(joined.extra["clips"]) == ["0", "1", "2"] and joined.extra["accent"] == "x"
    assert len(joined.audio.read(RATE)) == pytest.approx(joined.duration * RATE, abs=1)


def test_clips_of_several_rates_come_to_the_highest(tmp_path):
    rows = [clip("ann", 0, rate=8000), clip("ann", 1, rate=16000)]
    join_clips(rows, tmp_path / "out", strings=1, clips=2, gap=NO_GAP)
    info = soundfile.info(str(tmp_path / "out" / "audio" / "000000.flac"))
    assert info.samplerate == 16000
    assert info.frames == pytest.approx(sum(row.duration for row in rows) * 16000, abs=2)


@pytest.mark.parametrize(
    "words, message",
    [
        ({"strings": 0}, "strings must be 1 or more, but is 0"),
        ({"clips": 0}, r"clips must be 1 or more, .* but is \(0, 0\)"),
        ({"clips": (4, 2)}, r"clips must be .* but is \(4, 2\)"),
        ({"gap": (0.2, 0.1)}, r"gap must be a range .* but is \(0\.2, 0\.1\)"),
        ({"gap": (-0.1, 0.1)}, "gap must be a range"),
        ({"balance": "word"}, "balance must be 'speaker' or 'clip', but is 'word'"),
        ({"clips": (2, 6)}, r"speaker ben has 5 clips, 6 are asked for \(1 such of 2\)"),
        ({"by": "accent"}, "ann-0 has no accent, by which clips are joined"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(words, message, tmp_path):
    with pytest.raises(CorpusError, match=message):
        join_clips(corpus(ann=6, ben=5), tmp_path / "out", **{"strings": 2, "clips": 2, **words})
    assert not list(tmp_path.iterdir())


def test_rows_that_cannot_be_joined_are_named(tmp_path):
    for rows, message in (
        ([], "there are no clips to join"),
        ([clip("ann", 0, text=" ")], "memory: ann-0 has no text to join"),
        ([clip("ann", 0), clip("ann", 0)], "ann-0 is there twice"),
        ([replace(clip("ann", 0), speaker=None)], "ann-0 has no speaker"),
    ):
        with pytest.raises(CorpusError, match=message):
            join_clips(rows, tmp_path / "out", strings=1, clips=1)


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CorpusError, match="out is there already; choose another folder"):
        join_clips(corpus(ann=2), tmp_path / "out", strings=1, clips=1)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match="file/out: cannot be made"):
        join_clips([clip("ann", 0)], tmp_path / "file" / "out", strings=1, clips=1)


def test_a_clip_that_cannot_be_read_leaves_nothing_behind(tmp_path):
    gone = Utterance(id="g", audio=FileAudio(tmp_path / "gone.wav"), duration=Seconds(1.0), text="a", speaker="s")
    with pytest.raises(AudioError, match=r"gone\.wav"):
        join_clips([gone], tmp_path / "out", strings=1, clips=1)
    assert not list(tmp_path.iterdir())
