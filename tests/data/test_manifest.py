"""Corpora of every format: rows, laziness, ids, parts, fingerprints, writing."""

from __future__ import annotations

import csv
import io
import json
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.data.manifest import ArrayAudio, Corpus, FileAudio, Utterance, open_corpus
from manyvoice.errors import AudioError, CorpusError
from manyvoice.types import Seconds

Wav = Callable[..., Path]
Row = Mapping[str, object]
Lines = Callable[[Path, Sequence[Row | str]], Path]


def row(name: str = "a.wav", **more: object) -> dict[str, object]:
    return {"audio_filepath": name, "duration": 0.5, "text": "one two", **more}


def spoken(id: str = "a", duration: float = 1.0, text: str = "hello", **more: str) -> Utterance:
    audio = ArrayAudio(np.full(1600, 0.25, np.float32), 16_000)
    return Utterance(id=id, audio=audio, duration=Seconds(duration), text=text, **more)  # type: ignore[arg-type]


# --- NeMo ---------------------------------------------------------------------------------------------------------


def test_a_row_becomes_an_utterance(wav: Wav, tmp_path: Path, lines: Lines) -> None:
    wav("sub/a.wav", seconds=0.5)
    path = lines(tmp_path / "train.jsonl", [row("sub/a.wav", speaker=7, lang="en", label="x", age=6, note=None)])
    corpus = open_corpus(path)
    u = corpus[0]
    assert len(corpus) == 1
    assert (u.id, u.duration, u.text, u.speaker, u.language, u.label) == ("sub/a", 0.5, "one two", "7", "en", "x")
    assert u.extra == {"age": 6, "note": None}
    assert u.where == f"{path}:1"
    assert isinstance(u.audio, FileAudio) and u.audio.path == tmp_path / "sub/a.wav"
    assert u.audio.read(8000).shape == (4000,)


def test_blank_lines_count_in_messages_but_not_as_rows(tmp_path: Path) -> None:
    text = "\ufeff" + json.dumps(row(id="a")) + "\r\n\n   \n" + json.dumps(row(id="b"))
    (tmp_path / "m.json").write_text(text, encoding="utf-8")
    corpus = open_corpus(tmp_path / "m.json")
    assert [u.id for u in corpus] == ["a", "b"]
    assert corpus[1].where.endswith("m.json:4")


def test_an_offset_makes_a_segment_and_is_part_of_the_id(wav: Wav, tmp_path: Path, lines: Lines) -> None:
    wav("a.wav", seconds=1.0)
    u, whole = open_corpus(lines(tmp_path / "m.jsonl", [row(offset=0.25), row()]))
    assert (u.id, whole.id) == ("a@0.25", "a")
    assert len(u.audio.read()) == 8000
    assert u.audio.info().duration == 0.75


def test_a_missing_duration_is_read_from_the_header(wav: Wav, tmp_path: Path, lines: Lines) -> None:
    wav("a.wav", seconds=0.75)
    rows = [{"audio_filepath": "a.wav", "text": "x"}, {"audio_filepath": "a.wav", "text": "x", "offset": 0.5}]
    corpus = open_corpus(lines(tmp_path / "m.jsonl", [*rows, {"audio_filepath": "gone.wav", "text": "x"}]))
    assert [corpus[0].duration, corpus[1].duration] == [0.75, 0.25]
    with pytest.raises(AudioError, match=r"m\.jsonl:3: duration is missing and the file cannot give it: .*no such"):
        corpus[2]


@pytest.mark.parametrize(
    "bad,message",
    [
        (row(duration="x"), r"m\.jsonl:2: duration = 'x': must be a positive number of seconds; correct it, or leave"),
        (row(duration=0), "duration = 0: must be a positive"),
        (row(duration=-1), "duration = -1: must be a positive"),
        (row(duration=True), "duration = True"),
        (row(duration=float("nan")), "duration = nan"),
        (row(duration=float("inf")), "duration = inf"),
        (row(duration=10**400), "duration = a int too large to show|duration = 1000"),
        (row(offset=-0.5), "offset = -0.5: must be zero or more seconds"),
        (row(channel=-1), "channel = -1: must be a whole number"),
        (row(text=3), "text = 3: must be a string"),
        (row(text=None), "text is missing: must be a string; write what is said, or give a `label`"),
        (row(speaker=["a"]), r"speaker = \['a'\]: must be a string or a whole number"),
        (row(audio_filepath=None), "audio_filepath is missing: must be a path"),
        (row(audio_filepath=" "), "audio_filepath = ' ': must be a path"),
        (row(audio_filepath="a\0b"), "audio_filepath = .*: must be a path"),
        ("{oops", r"m\.jsonl:2: is not one JSON object: .*; write one object per line"),
        ("[1]", r"is not one JSON object but \[1\]"),
        ("[" * 100_000, "is not one JSON object"),
        ('{"text": "\\ud800"}', "is not UTF-8 text"),
    ],
)
def test_a_malformed_row_says_where_what_and_how(tmp_path: Path, bad: Row | str, message: str, lines: Lines) -> None:
    corpus = open_corpus(lines(tmp_path / "m.jsonl", [row(id="good"), bad, row(id="too")]))
    with pytest.raises(CorpusError, match=message):
        corpus[1]
    assert (corpus[0].id, corpus[2].id) == ("good", "too")


def test_text_may_be_left_out_where_a_label_is_the_target(tmp_path: Path, lines: Lines) -> None:
    u = open_corpus(lines(tmp_path / "m.jsonl", [{"path": "a.wav", "duration": 1, "label": 3}]))[0]
    assert (u.text, u.label) == ("", "3")


def test_ids_and_fingerprint_stay_when_the_corpus_moves(wav: Wav, tmp_path: Path, lines: Lines) -> None:
    wav("old/a.wav")
    path = lines(tmp_path / "old/m.jsonl", [row("./a.wav"), row(str(tmp_path / "old/a.wav"), offset=0.1)])
    before = open_corpus(path)
    ids, fingerprint = [u.id for u in before], before.fingerprint
    assert ids == ["a", "a@0.1"]
    lines(path, [row("a.wav"), row(str(tmp_path / "new/a.wav"), offset=0.1)])
    shutil.move(tmp_path / "old", tmp_path / "new")
    after = open_corpus(tmp_path / "new/m.jsonl")
    assert [u.id for u in after] == ids and after.fingerprint == fingerprint


@pytest.mark.parametrize("change", ["id", "duration", "text", "speaker", "label"])
def test_the_fingerprint_sees_every_field(tmp_path: Path, change: str, lines: Lines) -> None:
    one = row(id="a", speaker="s", label="l")
    two = {**one, change: 0.6 if change == "duration" else "other"}
    a, b = (open_corpus(lines(tmp_path / f"{k}.jsonl", [r])) for k, r in enumerate([one, two]))
    assert a.fingerprint != b.fingerprint
    assert a.fingerprint == open_corpus(lines(tmp_path / "c.jsonl", [{**one, "mood": "x"}])).fingerprint


def test_a_manifest_that_changes_while_in_use_is_noticed(tmp_path: Path, lines: Lines) -> None:
    path = lines(tmp_path / "m.jsonl", [row(id="a"), row(id="b")])
    corpus = open_corpus(path)
    lines(path, [row(id="a"), row(id="b"), row(id="c")])
    with pytest.raises(CorpusError, match=r"m\.jsonl: has changed since it was opened; open the corpus again"):
        corpus[1]


def test_gzip_is_read_like_plain_text_and_damage_is_named(tmp_path: Path, lines: Lines) -> None:
    rows = [row(id=str(i)) for i in range(1000)]
    corpus = open_corpus(lines(tmp_path / "m.jsonl.gz", rows))
    assert [u.id for u in corpus] == [r["id"] for r in rows]
    assert pickle.loads(pickle.dumps(corpus))[700].where.endswith("m.jsonl.gz:701")
    data = (tmp_path / "m.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(data[: len(data) // 2])
    (tmp_path / "no.jsonl.gz").write_bytes(b"hello")
    for name in ("cut", "no"):
        with pytest.raises(CorpusError, match=rf"{name}\.jsonl\.gz: is damaged as a gzip file"):
            open_corpus(tmp_path / f"{name}.jsonl.gz")


def test_opening_parses_one_row_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Lines) -> None:
    path = lines(tmp_path / "m.jsonl", [row(id=str(i)) for i in range(500)])
    parsed: list[int] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(1) or loads(text))
    corpus = open_corpus(path)
    assert len(corpus) == 500 and len(parsed) <= 1
    assert corpus[432].id == "432" and len(parsed) <= 2


# --- tables -------------------------------------------------------------------------------------------------------


def test_csv_with_aliases_quotes_and_line_ends_inside_quotes(tmp_path: Path) -> None:
    buffer = io.StringIO()
    table = [["Path", "Sentence", "duration", "client_id", "age"], ["a.wav", 'say "hi",\nthen go', "1.5", "s", ""]]
    csv.writer(buffer).writerows([*table, ["b.wav", "", "2", "", "x"]])
    (tmp_path / "m.csv").write_text(buffer.getvalue(), encoding="utf-8-sig", newline="")
    a, b = open_corpus(tmp_path / "m.csv")
    assert (a.id, a.text, a.duration, a.speaker, a.extra) == ("a", 'say "hi",\nthen go', 1.5, "s", {})
    assert (b.id, b.text, b.speaker, b.extra, b.where[-7:]) == ("b", "", None, {"age": "x"}, "m.csv:4")


def test_tsv_takes_quotes_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp3").write_bytes(b"x")
    path = tmp_path / "train.tsv"
    path.write_text('path\tsentence\tduration\na.mp3\t"so" he said, "\t1\nb.mp3\tx\n', encoding="utf-8")
    corpus = open_corpus(path)
    assert corpus[0].text == '"so" he said, "'
    assert corpus[0].audio.describe() == str(tmp_path / "clips/a.mp3")
    with pytest.raises(CorpusError, match=r"train\.tsv:3: has 2 columns, the header has 3; quote a text"):
        corpus[1]


def test_a_table_names_bad_numbers_and_missing_headers(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("file,transcript,duration\na.wav,x,long\n")
    with pytest.raises(CorpusError, match=r"m\.csv:2: duration = 'long': must be a positive number of seconds"):
        open_corpus(tmp_path / "m.csv")[0]
    (tmp_path / "n.csv").write_text("a.wav,x,1\n")
    with pytest.raises(CorpusError, match=r"n\.csv:1: columns = .*one of them of audio_filepath, path, .*header line"):
        open_corpus(tmp_path / "n.csv")
    (tmp_path / "e.csv").write_text("")
    with pytest.raises(CorpusError, match=r"e\.csv: is empty"):
        open_corpus(tmp_path / "e.csv")


@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0\r")), st.booleans()), max_size=8))
def test_any_text_comes_back_from_csv_and_json(
    tmp_path_factory: pytest.TempPathFactory, lines: Lines, rows: list[tuple[str, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    with (folder / "m.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["audio_filepath", "text", "duration"])
        writer.writerows([f"{i}.wav", text, 1 + i] for i, (text, _) in enumerate(rows))
    lines(folder / "m.jsonl", [row(f"{i}.wav", text=text, duration=1 + i) for i, (text, _) in enumerate(rows)])
    table, manifest = open_corpus(folder / "m.csv"), open_corpus(folder / "m.jsonl")
    assert table.texts() == manifest.texts() == [text for text, _ in rows]
    assert table.fingerprint == manifest.fingerprint
    kept = manifest.subset([i for i, (_, keep) in enumerate(rows) if keep])
    assert kept.write(folder / "out.jsonl").fingerprint == kept.fingerprint


# --- folders of sound ---------------------------------------------------------------------------------------------


def test_sound_with_text_beside(wav: Wav, tmp_path: Path) -> None:
    wav("x/b.wav", seconds=0.25)
    wav("x/a.flac")
    wav("x/c.wav")
    (tmp_path / "x/b.txt").write_text("b  said\n")
    (tmp_path / "x/a.txt").write_text("a said")
    corpus = open_corpus(tmp_path / "x")
    assert [(u.id, u.text) for u in (corpus[0], corpus[1])] == [("a", "a said"), ("b", "b said")]
    assert corpus[1].duration == 0.25
    with pytest.raises(CorpusError, match=r"x/c\.wav: no text: c\.txt must stand beside it"):
        corpus[2]


def test_librispeech_transcripts(wav: Wav, tmp_path: Path) -> None:
    wav("ls/84/121/84-121-0000.flac", seconds=0.5)
    (tmp_path / "ls/84/121/84-121.trans.txt").write_text("84-121-0000 GO DO YOU HEAR\n84-121-0001 GONE\n")
    corpus = open_corpus(tmp_path / "ls")
    u = corpus[0]
    assert (u.id, u.text, u.speaker, u.duration) == ("84-121-0000", "GO DO YOU HEAR", "84", 0.5)
    assert u.where.endswith("ls/84/121/84-121.trans.txt:1")
    with pytest.raises(AudioError, match=r"trans\.txt:2: .*no such file"):
        corpus[1]


def test_a_folder_with_manifests_asks_for_one(tmp_path: Path, lines: Lines) -> None:
    lines(tmp_path / "dev.jsonl", [row()])
    lines(tmp_path / "train.jsonl.gz", [row()])
    with pytest.raises(CorpusError, match=r"manifests dev\.jsonl, train\.jsonl\.gz; name the one you mean"):
        open_corpus(tmp_path)


# --- the corpus itself --------------------------------------------------------------------------------------------


def test_specs_that_name_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"gone\.jsonl': no such file or folder"):
        open_corpus(tmp_path / "gone.jsonl")
    (tmp_path / "m.xml").write_text("x")
    with pytest.raises(CorpusError, match=r"ends in '\.xml': must end in \.jsonl, \.json, \.csv or \.tsv"):
        open_corpus(tmp_path / "m.xml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="holds no manifest and no sound"):
        open_corpus(tmp_path / "empty")


def test_a_list_joins_and_plus_joins(tmp_path: Path, lines: Lines) -> None:
    a = lines(tmp_path / "a.jsonl", [row(id="a"), row(id="b")])
    b = lines(tmp_path / "b.jsonl", [row(id="c")])
    joined = open_corpus([a, str(b)])
    assert [u.id for u in joined] == ["a", "b", "c"]
    mixed = joined.subset([2, 0]) + open_corpus(a).subset([1]) + open_corpus([spoken("d")])
    assert [u.id for u in mixed] == ["c", "a", "b", "d"]
    assert mixed.durations_N.tolist() == [0.5, 0.5, 0.5, 1.0]
    assert len(open_corpus(lines(tmp_path / "empty.jsonl", []))) == 0


@given(st.lists(st.integers(-6, 5), max_size=12), st.lists(st.integers(0, 20), max_size=5))
def test_a_subset_is_what_a_list_would_give(first: list[int], second: list[int]) -> None:
    corpus = open_corpus([spoken(str(i), duration=1.0 + i) for i in range(6)])
    expected = [str(range(6)[i]) for i in first]
    chosen = corpus.subset(first)
    assert [u.id for u in chosen] == expected
    assert chosen[1:3].texts() == ["hello"] * len(expected[1:3])
    places = [i for i in second if i < len(first)]
    _ = chosen.durations_N
    assert chosen.subset(places).durations_N.tolist() == [1.0 + int(expected[i]) for i in places]
    with pytest.raises(IndexError):
        corpus.subset([6])
    with pytest.raises(IndexError):
        corpus[6]


def test_where_keeps_what_is_true() -> None:
    corpus = open_corpus([spoken("a", speaker="x"), spoken("b"), spoken("c", speaker="x")])
    assert [u.id for u in corpus.where(lambda u: u.speaker == "x")] == ["a", "c"]
    assert corpus.speakers() == ["x"]


@given(st.lists(st.integers(0, 9), min_size=12, max_size=40), st.integers(0, 5))
def test_a_split_covers_all_and_shares_no_speaker(speakers: list[int], seed: int) -> None:
    corpus = open_corpus([spoken(str(i), speaker=f"s{s}") for i, s in enumerate([*speakers, 0, 1, 2])])
    shares = {"train": 0.6, "dev": 0.2, "test": 0.2}
    parts = corpus.split(shares=shares, seed=seed)
    assert sorted(u.id for part in parts.values() for u in part) == sorted(u.id for u in corpus)
    named = [set(part.speakers()) for part in parts.values()]
    assert all(named) and sum(map(len, named)) == len(set.union(*named))
    again = corpus.split(shares=shares, seed=seed)
    assert {k: p.fingerprint for k, p in parts.items()} == {k: p.fingerprint for k, p in again.items()}


def test_shares_are_met_and_the_seed_matters() -> None:
    corpus = open_corpus([spoken(str(i)) for i in range(1000)])
    parts = corpus.split(by="utterance")
    assert {k: len(p) for k, p in parts.items()} == {"train": 900, "dev": 100}
    assert parts["dev"].fingerprint != corpus.split(by="utterance", seed=1)["dev"].fingerprint


def test_splits_that_cannot_be_are_refused() -> None:
    corpus = open_corpus([spoken("a", speaker="x"), spoken("b")])
    with pytest.raises(CorpusError, match="memory: speaker is missing: must be known to split"):
        corpus.split()
    with pytest.raises(CorpusError, match="1 speakers cannot fill the 2 parts train, dev"):
        corpus.subset([0]).split()
    with pytest.raises(CorpusError, match="must be positive and add up to 1"):
        corpus.split(shares={"a": 0.5})
    with pytest.raises(CorpusError, match="must be 'speaker' or 'utterance'"):
        corpus.split(by="mood")


def test_writing_keeps_everything_and_overwrites_only_when_told(wav: Wav, tmp_path: Path, lines: Lines) -> None:
    wav("in/a.wav")
    rows = [row(speaker="s", label="l", locale="en", mood="x", channel=0), row(offset=0.1, duration=0.2)]
    corpus = open_corpus(lines(tmp_path / "in/m.jsonl", rows))
    written = corpus.write(tmp_path / "out/new.jsonl")
    stored = json.loads((tmp_path / "out/new.jsonl").read_text().splitlines()[0])
    assert stored["audio_filepath"] == "../in/a.wav" and stored["mood"] == "x"
    assert written.fingerprint == corpus.fingerprint
    assert np.array_equal(written[1].audio.read(), corpus[1].audio.read())
    assert written[0].language == "en"
    with pytest.raises(CorpusError, match=r"new\.jsonl: exists already; choose another name"):
        corpus.write(tmp_path / "out/new.jsonl")
    assert len(corpus.subset([0]).write(tmp_path / "out/new.jsonl", overwrite=True)) == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new.jsonl"]


def test_writing_fails_without_a_trace(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="is in no file of its own; give an audio folder"):
        open_corpus([spoken()]).write(tmp_path / "m.jsonl")
    odd = Utterance(id="a", audio=FileAudio(Path("a.wav")), duration=Seconds(1.0), text="", extra={"x": object()})
    with pytest.raises(CorpusError, match="memory: a column has no JSON form: object cannot be written"):
        open_corpus([odd]).write(tmp_path / "m.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_sound_in_memory_is_written_beside(tmp_path: Path) -> None:
    corpus = open_corpus([spoken("a", duration=0.1), spoken("b", duration=0.1)])
    written = corpus.write(tmp_path / "m.jsonl", audio_folder=tmp_path / "sound")
    np.testing.assert_allclose(written[1].audio.read(), 0.25, atol=1e-4)
    assert written.fingerprint == corpus.fingerprint


def test_stats_count() -> None:
    corpus = open_corpus(
        [spoken("a", 1.0, "one two", speaker="x"), spoken("b", 3.0, "three", speaker="y"), spoken("c", 2.0)]
    )
    stats = corpus.stats(lambda text: text.split())
    assert (stats.utterances, stats.speakers, stats.without_speaker, stats.words) == (3, 2, 1, 4)
    assert stats.hours == pytest.approx(6 / 3600) and stats.tokens_per_second == pytest.approx(4 / 6)
    assert (stats.duration_quantiles[0.0], stats.duration_quantiles[0.5], stats.duration_quantiles[1.0]) == (1, 2, 3)
    assert "3 utterances, 0.00 h, 2 speakers (1 utterances without one)" in corpus.describe()
    assert "characters/s" in corpus.describe() and "labels/s" in stats.text()
    assert json.loads(json.dumps(stats.json()))["words"] == 4
    assert open_corpus([]).stats().tokens_per_second == 0


def _texts(corpus: Corpus) -> list[str]:
    return corpus.texts()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_read_the_same_rows(tmp_path: Path, method: str, lines: Lines) -> None:
    plain = lines(tmp_path / "m.jsonl", [row(id=str(i), text=f"t{i}") for i in range(300)])
    packed = lines(tmp_path / "m.jsonl.gz", [row(id=str(i), text=f"t{i}") for i in range(300)])
    corpus = open_corpus([plain, packed])
    texts = corpus.texts()
    parts = [corpus[k::2] for k in range(2)]
    if method == "spawn":  # a new interpreter would import this file by a name it does not have
        assert [pickle.loads(pickle.dumps(part)).texts() for part in parts] == [texts[0::2], texts[1::2]]
        return
    with get_context(method).Pool(2) as pool:
        assert pool.map(_texts, parts) == [texts[0::2], texts[1::2]]


# --- real speech --------------------------------------------------------------------------------------------------


def test_real_manifests_open(data: Path) -> None:
    corpus = open_corpus(data / "accented-english/train.jsonl")
    assert (len(corpus), len(corpus.speakers())) == (2500, 125)
    assert corpus.durations_N.sum() / 3600 == pytest.approx(2.88, abs=0.01)
    u = corpus[17]
    assert len(u.audio.read()) / 16_000 == pytest.approx(u.duration, abs=0.1)
    assert u.extra["first_language"] == "Mandarin"
