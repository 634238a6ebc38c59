"""lhotse cuts and Shar folders, and Hugging Face datasets, read as corpora."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from manyvoice.data.manifest import FileAudio, open_corpus
from manyvoice.errors import CorpusError
from manyvoice.types import Seconds

Wav = Callable[..., Path]
Row = Mapping[str, object]
Lines = Callable[[Path, Sequence[Row | str]], Path]


# --- lhotse -------------------------------------------------------------------------------------------------------


def cut(name: str, *, source: Row | None = None, **more: object) -> dict[str, object]:
    supervision = {"id": name, "recording_id": name, "start": 0, "duration": 1.0, "channel": 0, "text": f"say {name}"}
    recording = {
        "id": name,
        "sources": [source or {"type": "file", "channels": [0], "source": f"{name}.wav"}],
        "sampling_rate": 16_000,
        "num_samples": 16_000,
        "duration": 1.0,
        "channel_ids": [0],
    }
    said = [{**supervision, "language": "en", "speaker": f"sp-{name}", "custom": {"mood": "calm", "text": "raw"}}]
    body = {"id": name, "start": 0.0, "duration": 1.0, "channel": 0, "supervisions": said, "recording": recording}
    return {**body, "custom": {"snr": 3}, "type": "MonoCut", **more}


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
def test_a_cut_manifest_is_known_by_its_content(wav: Wav, tmp_path: Path, name: str, lines: Lines) -> None:
    wav("a.wav", seconds=1.0)
    corpus = open_corpus(lines(tmp_path / name, [cut("a"), cut("a", id="a-part", start=0.25, duration=0.5)]))
    whole, part = corpus
    assert (whole.id, whole.text, whole.speaker, whole.language) == ("a", "say a", "sp-a", "en")
    assert whole.extra == {"snr": 3, "mood": "calm", "custom_text": "raw"}
    assert whole.audio == FileAudio(tmp_path / "a.wav", None, Seconds(1.0))
    assert part.audio == FileAudio(tmp_path / "a.wav", Seconds(0.25), Seconds(0.5))
    assert len(part.audio.read()) == 8000


def test_several_supervisions_are_joined_in_time(tmp_path: Path, lines: Lines) -> None:
    one = cut("a")
    said = [{"start": 0.6, "text": "world", "speaker": "x"}, {"start": 0.1, "text": "hello", "speaker": "y"}]
    u = open_corpus(lines(tmp_path / "c.jsonl", [{**one, "supervisions": said}]))[0]
    assert (u.text, u.speaker) == ("hello world", None)


def test_one_channel_of_a_telephone_call(tmp_path: Path, lines: Lines) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([np.full(800, 0.5), np.full(800, -0.25)], axis=1), 16_000)
    one = cut("a", channel=1, duration=0.05)
    recording = {**dict(one["recording"]), "channel_ids": [0, 1]}  # type: ignore[call-overload]
    u = open_corpus(lines(tmp_path / "c.jsonl", [{**one, "recording": recording}]))[0]
    np.testing.assert_allclose(u.audio.read(), -0.25, atol=1e-4)
    np.testing.assert_allclose(open_corpus([u]).write(tmp_path / "m.jsonl")[0].audio.read(), -0.25, atol=1e-4)


@pytest.mark.parametrize(
    "bad,message",
    [
        ({"type": "MixedCut"}, "type = 'MixedCut': must be MonoCut or MultiCut; write the cuts as plain sound first"),
        ({"recording": None, "features": {}}, "the cut has no recording, only features"),
        ({"source": {"type": "command", "source": "touch x"}}, "recording.sources = .*: must be one of type 'file'"),
        ({"source": {"type": "url", "source": "http://x"}}, "recording.sources = .*: must be one of type 'file'"),
        ({"duration": "x"}, "duration = 'x'"),
        ({"supervisions": 3}, "supervisions = 3: must be a list"),
    ],
)
def test_cuts_that_would_compute_something_are_refused(tmp_path: Path, bad: Row, message: str, lines: Lines) -> None:
    corpus = open_corpus(lines(tmp_path / "c.jsonl", [cut("a"), cut("b", **bad)]))  # type: ignore[arg-type]
    with pytest.raises(CorpusError, match=rf"c\.jsonl:2: {message}"):
        corpus[1]


def test_recordings_alone_are_no_corpus(tmp_path: Path, lines: Lines) -> None:
    with pytest.raises(CorpusError, match="is a recording or supervision of lhotse; join the two to cuts"):
        open_corpus(lines(tmp_path / "r.jsonl", [dict(cut("a")["recording"])]))  # type: ignore[call-overload]


def shar(folder: Path, lines: Lines, shards: int = 2) -> Path:
    folder.mkdir()
    for s in range(shards):
        cuts = [cut(f"{s}{k}", source={"type": "shar", "channels": [0], "source": ""}, duration=0.5) for k in range(3)]
        lines(folder / f"cuts.{s:06d}.jsonl.gz", cuts)
        with tarfile.open(folder / f"recording.{s:06d}.tar", "w") as tar:
            for k, one in enumerate(cuts):
                sound = io.BytesIO()
                soundfile.write(sound, np.full(8000, (1 + 3 * s + k) / 16), 16_000, format="FLAC")
                for end, data in ((".flac", sound.getvalue()), (".json", b"{}")):
                    info = tarfile.TarInfo(f"{one['id']}{end}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def test_a_shar_folder_is_read_in_any_order(tmp_path: Path, lines: Lines) -> None:
    corpus = open_corpus(shar(tmp_path / "shar", lines))
    assert [u.id for u in corpus] == ["00", "01", "02", "10", "11", "12"]
    assert corpus[4].where.endswith("shar/cuts.000001.jsonl.gz:2")
    for i in (5, 0, 3):
        np.testing.assert_allclose(corpus[i].audio.read(), (1 + i) / 16, atol=1e-4)
    again = pickle.loads(pickle.dumps(corpus))
    np.testing.assert_allclose(again[2].audio.read(), 3 / 16, atol=1e-4)
    assert corpus[0].audio.info() == (0.5, 16_000, 1)


def test_a_shar_folder_whose_parts_disagree_is_refused(tmp_path: Path, lines: Lines) -> None:
    folder = shar(tmp_path / "shar", lines)
    shutil.copy(folder / "recording.000000.tar", tmp_path / "x.tar")
    (folder / "recording.000000.tar").unlink()
    with pytest.raises(CorpusError, match=r"cuts\.000000\.jsonl\.gz:1: .*recording\.000000\.tar cannot be read"):
        open_corpus(folder)[0]
    (folder / "recording.000000.tar").write_bytes((tmp_path / "x.tar").read_bytes())
    lines(folder / "cuts.000000.jsonl.gz", [cut("00", source={"type": "shar", "source": ""})])
    with pytest.raises(CorpusError, match="holds 3 sounds for 1 cuts; export the Shar folder again"):
        open_corpus(folder)[0]


@pytest.mark.filterwarnings("ignore")
def test_what_lhotse_writes_is_read_as_lhotse_reads_it(wav: Wav, tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse", exc_type=ImportError)
    recordings = [lhotse.Recording.from_file(wav(f"{k}.wav", seconds=0.5, hz=100.0 * (k + 1))) for k in range(3)]
    cuts = [recording.to_cut() for recording in recordings]
    for one in cuts:
        one.supervisions = [lhotse.SupervisionSegment(one.id, one.recording_id, 0, 0.5, text=f"t{one.id}", speaker="s")]
    whole = lhotse.CutSet.from_cuts([*cuts, cuts[0].truncate(offset=0.1, duration=0.2)])
    whole.to_file(tmp_path / "c.jsonl.gz")
    (tmp_path / "shar").mkdir()
    whole.to_shar(tmp_path / "shar", fields={"recording": "wav"}, shard_size=3)
    for path in (tmp_path / "c.jsonl.gz", tmp_path / "shar"):
        corpus = open_corpus(path)
        for ours, theirs in zip(corpus, whole, strict=True):
            assert (ours.id, ours.duration, ours.text) == (theirs.id, theirs.duration, theirs.supervisions[0].text)
            np.testing.assert_allclose(ours.audio.read(), theirs.load_audio()[0], atol=1e-4)


# --- Hugging Face -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_dataset_saved_to_disk(wav: Wav, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    sounds = [{"bytes": wav(f"{k}.wav", seconds=0.25 * (k + 1)).read_bytes(), "path": None} for k in range(2)]
    columns = {"audio": sounds, "sentence": ["a b", "c"], "label": [1, 0], "speaker_id": [4, 5]}
    table = datasets.Dataset.from_dict(columns)
    table = table.cast_column("audio", datasets.Audio(decode=False))
    table = table.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    table = table.cast_column("audio", datasets.Audio())
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "dict")
    for spec in (tmp_path / "one", f"hf:{tmp_path / 'one'}", f"hf:{tmp_path / 'dict'}:train", tmp_path / "dict/test"):
        corpus = open_corpus(spec)
        u = corpus[1]
        assert (len(corpus), u.id, u.text, u.speaker, u.label) == (2, "000000001", "c", "5", "no")
        assert u.duration == 0.5 and len(u.audio.read()) == 8000
    with pytest.raises(CorpusError, match=r"has the splits \['test', 'train'\]; name one: hf:.*::test"):
        open_corpus(tmp_path / "dict")
    written = open_corpus(tmp_path / "one").write(tmp_path / "m.jsonl", audio_folder=tmp_path / "sound")
    assert written.fingerprint == open_corpus(tmp_path / "one").fingerprint
    assert written[1].audio.info() == (0.5, 16_000, 1)


def test_a_hub_name_is_split_into_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    from manyvoice.data import hub

    asked: list[tuple[object, ...]] = []

    class Library:
        @staticmethod
        def load_dataset(name: str, config: str | None, split: str | None) -> object:
            asked.append((name, config, split))
            raise ConnectionError("no network\nhere")

    monkeypatch.setattr(hub, "_datasets", lambda: Library)
    for spec in ("u/set", "u/set:en", "u/set:en:test", "u/set::dev", "u/set:train"):
        with pytest.raises(CorpusError, match=rf"hf:{spec}: cannot be loaded: no network here; check the name"):
            open_corpus(f"hf:{spec}")
    assert asked == [
        ("u/set", None, None), ("u/set", "en", None), ("u/set", "en", "test"), ("u/set", None, "dev"),
        ("u/set", None, "train"),
    ]  # fmt: skip


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"needs the extra: pip install 'manyvoice\[hf\]'"):
        open_corpus("hf:some/set")
