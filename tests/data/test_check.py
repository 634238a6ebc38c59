"""Every kind of problem is found, named by file and line, and nothing is dropped unsaid."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.data.check import Problem, Report, check
from manyvoice.data.manifest import ArrayAudio, Corpus, Utterance, open_corpus
from manyvoice.data.tokens import train_tokenizer
from manyvoice.errors import CorpusError
from manyvoice.types import Seconds

Wav = Callable[..., Path]


class Letters:
    """A tokenizer of small letters; digits vanish."""

    def encode(self, text: str) -> Sequence[int]:
        return [ord(c) for c in text if not c.isdigit()]

    def unknown(self, text: str) -> set[str]:
        return {c for c in text if not (c.islower() or c.isdigit() or c == " ")}


def row(name: str = "a.wav", **more: object) -> dict[str, object]:
    return {"audio_filepath": name, "duration": 0.5, "text": "one", **more}


@pytest.fixture
def corpus_of(wav: Wav, tmp_path: Path) -> Callable[..., Corpus]:
    """A corpus of rows or lines beside half a second of sound, ``a.wav``."""
    wav("a.wav", seconds=0.5)

    def build(*rows: Mapping[str, object] | str) -> Corpus:
        text = "".join(
            (one if isinstance(one, str) else json.dumps({"id": f"u{k}", **one})) + "\n" for k, one in enumerate(rows)
        )
        (tmp_path / "train.jsonl").write_text(text)
        return open_corpus(tmp_path / "train.jsonl")

    return build


def found(report: Report) -> list[tuple[str, int]]:
    return [(problem.kind, problem.index) for problem in report.problems]


def test_a_good_corpus_has_no_problems(corpus_of: Callable[..., Corpus]) -> None:
    seen: list[tuple[int, int]] = []
    corpus = corpus_of(row(), row(text="two"))
    report = check(
        corpus, tokenizer=Letters(), encoder_frames=lambda s: 50, deep=True, progress=lambda *at: seen.append(at)
    )
    assert report.problems == () and report.text() == "2 utterances, no problems"
    assert seen == [(1, 2), (2, 2)]
    report.raise_if_bad()
    assert report.keep(corpus).fingerprint == corpus.fingerprint


def test_all_malformed_rows_are_named_not_only_the_first(corpus_of: Callable[..., Corpus]) -> None:
    report = check(corpus_of(row(duration="x"), row(), "{", row(duration=-1), row(text=None)))
    assert found(report) == [("malformed row", k) for k in (0, 2, 3, 4)]
    assert str(report.problems[0]).split("train.jsonl:")[1].startswith("1: malformed row: duration = 'x': must be")
    assert [p.where.rpartition(":")[2] for p in report.problems] == ["1", "3", "4", "5"]


def test_missing_and_unreadable_audio(corpus_of: Callable[..., Corpus], tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    unknown = {"audio_filepath": "bad.wav", "text": "x"}
    report = check(corpus_of(row("gone.wav"), row("bad.wav"), unknown))
    assert found(report) == [("missing audio", 0), ("unreadable audio", 1), ("unreadable audio", 2)]
    assert "gone.wav: no such file; correct the path or leave it out" in report.problems[0].message


def test_the_row_against_the_header(corpus_of: Callable[..., Corpus]) -> None:
    rows = [row(duration=0.45), row(duration=0.3), row(duration=0.3, offset=0), row(duration=0.7)]
    report = check(corpus_of(*rows, row(duration=0.4, offset=0.3), row(duration=0.2, offset=0.3)))
    assert found(report) == [("wrong duration", 1), ("beyond the end", 3), ("beyond the end", 4)]
    assert "duration = 0.3: " in report.problems[0].message and "is 0.500 s long" in report.problems[0].message
    assert "ends 0.200 s before the row does" in report.problems[2].message


def test_damage_behind_the_header_is_found_by_looking_deep(corpus_of: Callable[..., Corpus], tmp_path: Path) -> None:
    noise_N = np.random.default_rng(0).uniform(-0.5, 0.5, 64_000)
    soundfile.write(tmp_path / "full.flac", noise_N, 16_000)
    data = (tmp_path / "full.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    soundfile.write(tmp_path / "still.wav", np.zeros(8000), 16_000)
    corpus = corpus_of(row("cut.flac", duration=4.0), row("still.wav"))
    assert found(check(corpus)) == []
    report = check(corpus, deep=True)
    assert found(report) == [("unreadable audio", 0), ("silence", 1)]
    assert [p.kind for p in report.warnings()] == ["silence"]


def test_texts(corpus_of: Callable[..., Corpus]) -> None:
    rows = [row(text=" "), row(text="ABa"), row(text="12"), {**row(text=""), "label": "x"}, row(text="é")]
    report = check(corpus_of(*rows), tokenizer=Letters())
    assert found(report) == [("empty text", 0), ("unknown characters", 1), ("empty text", 2)]
    assert "'AB': the tokenizer has none" in report.problems[1].message


def test_words_that_a_word_tokenizer_lacks_are_called_words(corpus_of: Callable[..., Corpus]) -> None:
    report = check(corpus_of(row(text="up x down")), tokenizer=train_tokenizer(["up"], "words"))
    assert found(report) == [("unknown words", 0)]
    assert "'down x': the tokenizer knows whole words and not these; leave the row out" in report.problems[0].message


def test_duplicate_ids_keep_the_first(corpus_of: Callable[..., Corpus]) -> None:
    corpus = corpus_of(row(id="x"), row(id="y"), row(id="x"), row(id="x"))
    report = check(corpus)
    assert found(report) == [("duplicate id", 2), ("duplicate id", 3)]
    assert "id = 'x': is also at" in report.problems[0].message and "train.jsonl:1;" in report.problems[0].message
    assert [u.id for u in report.keep(corpus)] == ["x", "y"]


def test_duplicate_ids_in_memory_are_seen() -> None:
    audio = ArrayAudio(np.full(1600, 0.1, np.float32), 16_000)
    u = Utterance(id="a", audio=audio, duration=Seconds(0.1), text="x")
    assert found(check(open_corpus([u, u]))) == [("duplicate id", 1)]


@pytest.mark.parametrize("text,needed", [("abc", 3), ("aab", 4), ("aaa", 5), ("a a", 3)])
def test_a_repeated_label_needs_a_blank_between(corpus_of: Callable[..., Corpus], text: str, needed: int) -> None:
    corpus = corpus_of(row(text=text))
    assert found(check(corpus, tokenizer=Letters(), encoder_frames=lambda s: needed)) == []
    report = check(corpus, tokenizer=Letters(), encoder_frames=lambda s: needed - 1)
    assert found(report) == [("too many labels", 0)]
    assert (
        f"needs {needed} encoder frames for {len(text)} labels, 0.5 s give {needed - 1}" in report.problems[0].message
    )


def test_fast_speech_is_a_warning_in_the_upper_tail_only(corpus_of: Callable[..., Corpus]) -> None:
    rows = [row(text="ten letter"[: 9 + k % 2]) for k in range(40)]
    corpus = corpus_of(*rows, row(text="x" * 60), row(text="y"))
    report = check(corpus)
    assert found(report) == [("fast speech", 40)]
    assert "120.0 characters per second" in report.problems[0].message
    report.raise_if_bad()
    assert len(report.keep(corpus)) == 42
    assert found(check(corpus, max_zscore=100.0)) == []


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_equal_speeds_have_no_outliers(corpus_of: Callable[..., Corpus], count: int) -> None:
    assert found(check(corpus_of(*[row()] * 0, *[row() for _ in range(count)]), max_zscore=0.0)) == []


def test_the_report_counts_all_and_shows_some(corpus_of: Callable[..., Corpus]) -> None:
    corpus = corpus_of(*[row("gone.wav") for _ in range(30)], row(text=""))
    report = check(corpus)
    assert report.counts() == {"missing audio": 30, "empty text": 1}
    text = report.text(limit=3)
    assert text.startswith("31 utterances, 31 errors, 0 warnings: missing audio 30, empty text 1")
    assert len(text.splitlines()) == 5 and text.endswith("... and 28 more")
    expected = (
        r"train\.jsonl:1: missing audio: (?s:.*)31 errors in 31 utterances \(missing audio 30, empty text 1\); "
        r"`manyvoice corpus check` lists all; correct them, or train without them with corpus.skip_bad=true"
    )
    with pytest.raises(CorpusError, match=expected):
        report.raise_if_bad()
    with pytest.raises(CorpusError, match="31 utterances, the corpus has 3; check it again"):
        report.keep(corpus.subset([0, 1, 2]))


def test_errors_come_before_warnings() -> None:
    problems = (Problem("silence", "m:1", "zeros", 0), Problem("empty text", "m:2", "none", 1))
    shown = Report(problems, 2).text().splitlines()
    assert shown[1].strip().startswith("m:2: empty text") and shown[2].strip().startswith("m:1: silence")


@given(st.lists(st.sampled_from(["good", "empty", "broken", "twice"]), max_size=12))
def test_kept_and_bad_rows_are_all_rows(tmp_path_factory: pytest.TempPathFactory, kinds: list[str]) -> None:
    folder = tmp_path_factory.mktemp("c")
    soundfile.write(folder / "a.wav", np.full(8000, 0.1), 16_000)
    forms = {"good": {}, "empty": {"text": ""}, "broken": {"duration": None, "offset": "x"}, "twice": {"id": "same"}}
    rows = [{**row(), "id": str(k), **forms[kind]} for k, kind in enumerate(kinds)]
    (folder / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    corpus = open_corpus(folder / "m.jsonl")
    report = check(corpus)
    kept = report.keep(corpus)
    assert len(kept) + len({p.index for p in report.errors()}) == len(rows)
    assert check(kept).problems == ()


def test_real_speech_is_clean(data: Path) -> None:
    corpus = open_corpus(data / "accented-english/train.jsonl")
    report = check(corpus)
    assert report.utterances == 2500
    assert report.errors() == (), report.text()
    assert all(problem.kind == "fast speech" for problem in report.warnings())
