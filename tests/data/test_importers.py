from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from manyvoice.data.importers import CORPORA, import_corpus
from manyvoice.data.manifest import open_corpus
from manyvoice.errors import AudioError, CorpusError, UsageError


def sound(path: Path, seconds: float = 0.1, rate: int = 16000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(seconds * rate), np.int16), rate, format=path.suffix[1:].upper())


def lines(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def speechocean(at: Path) -> Path:
    for split, speaker, utts in (("train", "0001", ("000010011", "000010035")), ("test", "0003", ("000030012",))):
        for k, utt in enumerate(utts):
            sound(at / "WAVE" / f"SPEAKER{speaker}" / f"{utt}.WAV", 0.1 * (k + 1))
        lines(at / split / "wav.scp", *(f"{utt}\tWAVE/SPEAKER{speaker}/{utt}.WAV" for utt in utts))
        lines(at / split / "text", *(f"{utt}\tWE CALL IT BEAR" for utt in utts))
        lines(at / split / "utt2spk", *(f"{utt}\t{speaker}" for utt in utts))
        lines(at / split / "spk2age", f"{speaker}\t6")
        lines(at / split / "spk2gender", f"{speaker}\tm")
    return at


def fsdd(at: Path) -> Path:
    for index in (0, 4, 5, 49):
        sound(at / "recordings" / f"7_jackson_{index}.wav", rate=8000)
    sound(at / "recordings" / "0_theo_12.wav", rate=8000)
    told = "{'jackson': {'gender': 'male', 'accent': 'USA/neutral', 'language': 'english'},\n}"
    lines(at / "metadata.py", '"""Speakers."""', "", f"metadata = {told}")
    return at


def librispeech(at: Path) -> Path:
    for split, speaker, chapter in (("dev-clean", "84", "121123"), ("test-clean", "1089", "134686")):
        folder = at / split / speaker / chapter
        utts = [f"{speaker}-{chapter}-{k:04d}" for k in range(2)]
        for utt in utts:
            sound(folder / f"{utt}.flac")
        lines(folder / f"{speaker}-{chapter}.trans.txt", *(f"{utt} GO DO YOU HEAR" for utt in utts))
    rows = ("84   | F | dev-clean        | 8.02  | A Name", "1089 | M | test-clean | 8.03 | A.|Name")
    lines(at / "SPEAKERS.TXT", "; comment | with bars", ";ID  |SEX| SUBSET |MINUTES| NAME", *rows)
    return at


def kespeech(at: Path) -> Path:
    for part, utt, speaker, label in (
        ("train_phase1", "1000001_0be08a7e", "1000001", "Zhongyuan"),
        ("test", "1000002_11ad5b2c", "1000002", "Mandarin"),
    ):
        sound(at / "Audio" / speaker / "phase1" / f"{utt}.wav")
        tasks = at / "Tasks" / "ASR" / part
        lines(tasks / "wav.scp", f"{utt} Audio/{speaker}/phase1/{utt}.wav")
        lines(tasks / "text", f"{utt} 你好<SPOKEN_NOISE>世界")
        lines(tasks / "utt2spk", f"{utt} {speaker}")
        lines(tasks / "utt2subdialect", f"{utt} {label}")
    lines(at / "Metadata" / "spk2age", "1000001 28", "1000002 Unknown")
    lines(at / "Metadata" / "spk2gender", "1000001 Female", "1000002 Male")
    lines(at / "Metadata" / "spk2city", "1000001 Zhengzhou", "1000002 Beijing")
    return at


MAKE = {"fsdd": fsdd, "kespeech": kespeech, "librispeech": librispeech, "speechocean762": speechocean}


def rows_of(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def report_of(out: Path) -> dict:
    return json.loads((out / "corpus.json").read_text(encoding="utf-8"))


def test_every_importer_has_a_fake_copy_here():
    assert set(MAKE) == set(CORPORA)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_every_manifest_points_at_audio_of_the_stated_duration(name, tmp_path):
    manifests = import_corpus(name, MAKE[name](tmp_path / "copy"), tmp_path / "out")
    assert manifests
    for split, manifest in manifests.items():
        assert manifest == tmp_path / "out" / f"{split}.jsonl"
        for row in rows_of(manifest):
            assert not Path(row["audio_filepath"]).is_absolute()
            info = soundfile.info(str(manifest.parent / row["audio_filepath"]))
            assert row["duration"] == pytest.approx(info.duration, abs=1e-4)
            assert row["text"] and row["speaker"] and row["id"]
    report = report_of(tmp_path / "out")
    assert report["name"] == name and report["version"] is None
    assert report["licence"] == CORPORA[name].licence and report["source"].startswith("https://")
    assert report["manifests"] == [manifest.name for manifest in manifests.values()]
    for split, manifest in manifests.items():
        assert report["splits"][split]["utterances"] == len(rows_of(manifest))
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", sorted(MAKE))
def test_what_is_imported_can_be_opened(name, tmp_path):
    for manifest in import_corpus(name, MAKE[name](tmp_path / "copy"), tmp_path / "out").values():
        for utterance, row in zip(open_corpus(manifest), rows_of(manifest), strict=True):
            assert (utterance.id, utterance.text, utterance.label) == (row["id"], row["text"], row.get("label"))
            assert len(utterance.audio.read()) == pytest.approx(16000 * row["duration"], abs=2)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_importing_twice_gives_the_same_bytes(name, tmp_path):
    copy = MAKE[name](tmp_path / "copy")
    once, again = (import_corpus(name, copy, tmp_path / out) for out in ("a", "b"))
    assert {s: p.read_bytes() for s, p in once.items()} == {s: p.read_bytes() for s, p in again.items()}


def test_speechocean762(tmp_path):
    manifests = import_corpus("speechocean762", speechocean(tmp_path / "copy"), tmp_path / "out")
    assert list(manifests) == ["train", "test"]
    assert rows_of(manifests["train"])[1] == {
        "id": "000010035",
        "audio_filepath": "../copy/WAVE/SPEAKER0001/000010035.WAV",
        "duration": 0.2,
        "text": "we call it bear",
        "speaker": "0001",
        "gender": "m",
        "age": 6,
        "first_language": "Mandarin",
    }
    report = report_of(tmp_path / "out")
    assert report["splits"]["train"] == {"utterances": 2, "speakers": 1, "hours": 0.0001}
    assert report["licence"] == "Apache-2.0" and report["left_out"] == {} and report["unknown"] == {}


def test_fsdd_splits_by_the_published_rule(tmp_path):
    manifests = import_corpus("fsdd", fsdd(tmp_path / "copy"), tmp_path / "out")
    assert [row["id"] for row in rows_of(manifests["test"])] == ["7_jackson_0", "7_jackson_4"]
    assert [row["id"] for row in rows_of(manifests["train"])] == ["0_theo_12", "7_jackson_49", "7_jackson_5"]
    theo, jackson = rows_of(manifests["train"])[:2]
    assert theo["text"] == "zero" and "gender" not in theo
    assert jackson["text"] == "seven" and jackson["gender"] == "m" and jackson["accent"] == "USA/neutral"
    assert report_of(tmp_path / "out")["unknown"] == {"gender": 1, "accent": 1}


def test_librispeech(tmp_path):
    manifests = import_corpus("librispeech", librispeech(tmp_path / "copy"), tmp_path / "out")
    assert sorted(manifests) == ["dev-clean", "test-clean"]
    row = rows_of(manifests["test-clean"])[0]
    assert (row["text"], row["speaker"], row["gender"]) == ("go do you hear", "1089", "m")


def test_kespeech_has_the_subdialect_as_label(tmp_path):
    manifests = import_corpus("kespeech", kespeech(tmp_path / "copy"), tmp_path / "out")
    assert list(manifests) == ["train_phase1", "test"]
    row = rows_of(manifests["train_phase1"])[0]
    assert row["text"] == "你好世界"
    assert (row["label"], row["gender"], row["age"], row["city"]) == ("Zhongyuan", "f", 28, "Zhengzhou")
    report = report_of(tmp_path / "out")
    assert "age" not in rows_of(manifests["test"])[0] and report["unknown"] == {"age": 1}
    assert report["splits"]["test"]["labels"] == {"Mandarin": 1}
    assert "non-commercial" in report["licence"]
    assert report["left_out"]["<SPOKEN_NOISE> was taken out of the transcript"]["count"] == 2


def test_what_is_left_out_is_counted_with_its_reason(tmp_path):
    copy = speechocean(tmp_path / "copy")
    sound(copy / "WAVE" / "SPEAKER0001" / "000019999.WAV")
    sound(copy / "WAVE" / "SPEAKER0001" / "000010011.WAV", seconds=0.0)
    lines(copy / "test" / "text", "000030012\t")
    manifests = import_corpus("speechocean762", copy, tmp_path / "out")
    assert [row["id"] for row in rows_of(manifests["train"])] == ["000010035"] and list(manifests) == ["train"]
    assert report_of(tmp_path / "out")["left_out"] == {
        "no wav.scp lists the audio": {"count": 1, "first": ["WAVE/SPEAKER0001/000019999.WAV"]},
        "the audio has no samples": {"count": 1, "first": ["000010011"]},
        "the transcript is empty": {"count": 1, "first": ["000030012"]},
    }


def test_fsdd_names_that_say_nothing_are_left_out(tmp_path):
    copy = fsdd(tmp_path / "copy")
    sound(copy / "recordings" / "seven.wav")
    import_corpus("fsdd", copy, tmp_path / "out")
    reason = "the name is not DIGIT_SPEAKER_INDEX.wav"
    assert report_of(tmp_path / "out")["left_out"] == {reason: {"count": 1, "first": ["recordings/seven.wav"]}}


def test_an_unknown_corpus_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="'timit' is not one that can be imported; give one of fsdd, kespeech"):
        import_corpus("timit", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", sorted(MAKE))
def test_a_missing_folder_and_a_wrong_layout_say_what_is_expected(name, tmp_path):
    with pytest.raises(CorpusError, match="absent is not a folder; give the folder of your copy"):
        import_corpus(name, tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=rf"empty is not laid out as {name} is published: .* missing; expected "):
        import_corpus(name, tmp_path / "empty", tmp_path / "out")
    MAKE[name](tmp_path / "above" / "copy")
    with pytest.raises(CorpusError, match=r"the corpus seems to be in .*copy: give that"):
        import_corpus(name, tmp_path / "above", tmp_path / "out")
    assert not (tmp_path / "out").exists()


MISSING_AUDIO = {
    "speechocean762": "WAVE/SPEAKER0001/000010011.WAV",
    "librispeech": "dev-clean/84/121123/84-121123-0001.flac",
    "kespeech": "Audio/1000001/phase1/1000001_0be08a7e.wav",
}


@pytest.mark.parametrize("name", sorted(MISSING_AUDIO))
def test_missing_audio_is_refused_by_path(name, tmp_path):
    copy = MAKE[name](tmp_path / "copy")
    (copy / MISSING_AUDIO[name]).unlink()
    with pytest.raises(CorpusError, match=f"{MISSING_AUDIO[name]} is missing, though the corpus lists it: .* unpack"):
        import_corpus(name, copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_audio_is_refused_by_path(tmp_path):
    copy = speechocean(tmp_path / "copy")
    (copy / MISSING_AUDIO["speechocean762"]).write_bytes(b"no sound")
    with pytest.raises(AudioError, match=MISSING_AUDIO["speechocean762"]):
        import_corpus("speechocean762", copy, tmp_path / "out")


@pytest.mark.parametrize("file, what", [("text", "transcript"), ("utt2spk", "speaker")])
def test_an_utterance_without_transcript_or_speaker_is_refused(file, what, tmp_path):
    copy = speechocean(tmp_path / "copy")
    lines(copy / "train" / file, "000010011\tX")
    with pytest.raises(CorpusError, match=rf"000010035 is without {what}: .*train/{file} should list it"):
        import_corpus("speechocean762", copy, tmp_path / "out")


def test_a_transcript_without_audio_is_refused(tmp_path):
    copy = speechocean(tmp_path / "copy")
    lines(copy / "test" / "text", "000030012\tX", "000030013\tX", "000030014\tX")
    with pytest.raises(CorpusError, match=r"000030013, 000030014 are without audio: .*test/wav\.scp should list them"):
        import_corpus("speechocean762", copy, tmp_path / "out")


def test_librispeech_audio_without_its_line_or_its_file_of_transcripts_is_refused(tmp_path):
    copy = librispeech(tmp_path / "copy")
    chapter = copy / "dev-clean" / "84" / "121123"
    lines(chapter / "84-121123.trans.txt", "84-121123-0000 GO")
    with pytest.raises(CorpusError, match=r"84-121123-0001 is without transcript: .*84-121123\.trans\.txt should"):
        import_corpus("librispeech", copy, tmp_path / "out")
    (chapter / "84-121123.trans.txt").unlink()
    with pytest.raises(CorpusError, match=r"84-121123-000\d is without transcript: .*84-121123\.trans\.txt should"):
        import_corpus("librispeech", copy, tmp_path / "out")


@pytest.mark.parametrize("file", ["train/text", "train/utt2spk"])
def test_a_missing_list_is_named(file, tmp_path):
    copy = speechocean(tmp_path / "copy")
    (copy / file).unlink()
    with pytest.raises(CorpusError, match=f"{file} is missing, but belongs to the corpus"):
        import_corpus("speechocean762", copy, tmp_path / "out")


def test_lists_that_make_no_sense_are_refused(tmp_path):
    copy = speechocean(tmp_path / "copy")
    lines(copy / "test" / "wav.scp", "000030012 sox in.wav -t wav - |")
    with pytest.raises(CorpusError, match="000030012 is the command .* commands are not run"):
        import_corpus("speechocean762", copy, tmp_path / "out")
    lines(copy / "test" / "wav.scp", "000030012 a.wav", "000030012 b.wav")
    with pytest.raises(CorpusError, match=r"test/wav\.scp:2: 000030012 is there twice"):
        import_corpus("speechocean762", copy, tmp_path / "out")
    (copy / "test" / "wav.scp").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(CorpusError, match=r"test/wav\.scp must be UTF-8 text"):
        import_corpus("speechocean762", copy, tmp_path / "out")


def test_metadata_of_speakers_is_read_and_never_run(tmp_path):
    copy = fsdd(tmp_path / "copy")
    lines(copy / "metadata.py", f"metadata = open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CorpusError, match=r"metadata\.py must hold .* remove it to go without"):
        import_corpus("fsdd", copy, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    (copy / "metadata.py").unlink()
    import_corpus("fsdd", copy, tmp_path / "out")
    assert report_of(tmp_path / "out")["unknown"] == {"gender": 5, "accent": 5}


def test_a_librispeech_table_of_speakers_that_is_none_is_refused(tmp_path):
    copy = librispeech(tmp_path / "copy")
    lines(copy / "SPEAKERS.TXT", "84 F dev-clean")
    with pytest.raises(CorpusError, match=r"SPEAKERS\.TXT must have rows of ID \| SEX"):
        import_corpus("librispeech", copy, tmp_path / "out")


def test_kespeech_without_any_part_is_refused(tmp_path):
    copy = kespeech(tmp_path / "copy")
    for part in ("train_phase1", "test"):
        (copy / "Tasks" / "ASR" / part / "wav.scp").unlink()
    with pytest.raises(CorpusError, match="has none of train_phase1, .* with a wav.scp"):
        import_corpus("kespeech", copy, tmp_path / "out")


def test_an_empty_corpus_is_refused(tmp_path):
    lines(tmp_path / "copy" / "SPEAKERS.TXT", "; nobody")
    with pytest.raises(CorpusError, match="has no utterance to import: expected SPLIT/SPEAKER/CHAPTER"):
        import_corpus("librispeech", tmp_path / "copy", tmp_path / "out")


def test_an_earlier_import_is_kept_unless_overwriting_is_allowed(tmp_path):
    copy, out = librispeech(tmp_path / "copy"), tmp_path / "out"
    import_corpus("librispeech", copy, out)
    lines(out / "mine.jsonl", "{}")
    before = (out / "dev-clean.jsonl").read_bytes()
    with pytest.raises(CorpusError, match=r"dev-clean\.jsonl, .* are already there; choose another folder"):
        import_corpus("librispeech", copy, out)
    assert (out / "dev-clean.jsonl").read_bytes() == before
    (copy / "test-clean").rename(copy / "test-other")
    import_corpus("librispeech", copy, out, overwrite=True)
    # What the earlier import wrote goes, what it did not write stays.
    assert sorted(path.name for path in out.iterdir()) == [
        "corpus.json",
        "dev-clean.jsonl",
        "mine.jsonl",
        "test-other.jsonl",
    ]


def test_overwriting_removes_nothing_outside_the_folder(tmp_path):
    copy, out = fsdd(tmp_path / "copy"), tmp_path / "out"
    lines(tmp_path / "precious.jsonl", "{}")
    lines(out / "corpus.json", json.dumps({"manifests": ["../precious.jsonl", "precious.txt"]}))
    lines(out / "precious.txt", "mine")
    import_corpus("fsdd", copy, out, overwrite=True)
    assert (tmp_path / "precious.jsonl").exists() and (out / "precious.txt").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    lines(tmp_path / "out", "a file")
    with pytest.raises(CorpusError, match="out cannot be written .* choose a folder where you may write"):
        import_corpus("fsdd", fsdd(tmp_path / "copy"), tmp_path / "out")


def test_a_stated_version_is_kept(tmp_path):
    copy = fsdd(tmp_path / "copy")
    lines(copy / "VERSION", "1.0.10")
    import_corpus("fsdd", copy, tmp_path / "out")
    assert report_of(tmp_path / "out")["version"] == "1.0.10"


def test_manifests_may_lie_inside_the_copy(tmp_path):
    copy = fsdd(tmp_path / "copy")
    manifests = import_corpus("fsdd", copy, copy)
    assert rows_of(manifests["test"])[0]["audio_filepath"] == "recordings/7_jackson_0.wav"
