"""Error counts against a plain Levenshtein distance, normalisers, intervals, tables."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.decode.wer import (
    NORMALISERS,
    Confusion,
    Counts,
    Op,
    align_chars,
    align_words,
    alignment,
    basic,
    resampled_sums,
    score,
    show,
    whisper_english,
)
from manyvoice.errors import DecodeError, UsageError


def levenshtein(a, b) -> int:
    """The distance by its definition, one row at a time."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


# Few different words, so that they repeat; one-letter words and numbers are where hashing could go wrong.
sentences = st.lists(st.sampled_from(["a", "b", "aa", "97", "the"]), max_size=9).map(" ".join)


@given(reference=sentences, hypothesis=sentences)
def test_errors_are_the_levenshtein_distance(reference, hypothesis):
    words = align_words(reference, hypothesis)
    assert words.errors == levenshtein(reference.split(), hypothesis.split())
    assert words.reference == len(reference.split())
    assert words.hits + words.substitutions + words.insertions == len(hypothesis.split())
    chars = align_chars(reference, hypothesis)
    assert chars.errors == levenshtein(reference, hypothesis) and chars.reference == len(reference)


@given(reference=sentences, hypothesis=sentences)
def test_exchanging_the_texts_exchanges_deletions_and_insertions(reference, hypothesis):
    there, back = align_words(reference, hypothesis), align_words(hypothesis, reference)
    assert there.errors == back.errors
    assert there.deletions - there.insertions == back.insertions - back.deletions


@given(reference=sentences, hypothesis=sentences, unit=st.sampled_from(["word", "char"]))
def test_the_listed_steps_spell_both_texts_and_agree_with_the_counts(reference, hypothesis, unit):
    ops = alignment(reference, hypothesis, unit)
    cut = str.split if unit == "word" else list
    assert [op.reference for op in ops if op.reference] == cut(reference)
    assert [op.hypothesis for op in ops if op.hypothesis] == cut(hypothesis)
    assert all((op.kind == "hit") == (op.reference == op.hypothesis) for op in ops)
    counts = (align_words if unit == "word" else align_chars)(reference, hypothesis)
    assert sum(op.kind != "hit" for op in ops) == counts.errors


def test_a_known_alignment():
    assert align_words("the cat sat", "the bat sat down") == Counts(2, 1, 0, 1)
    ops = alignment("the cat sat", "the bat sat down")
    assert ops[1:] == [Op("substitution", "cat", "bat"), Op("hit", "sat", "sat"), Op("insertion", "", "down")]
    assert show(ops) == "REF: the cat sat *\nHYP: the bat sat down\n         S       I"
    assert show(alignment("a b", "b")) == "REF: a b\nHYP: * b\n     D"


def test_counts_add_up_and_have_a_rate():
    both = Counts(8, 1, 1, 0) + Counts(0, 0, 0, 2)
    assert both == Counts(8, 1, 1, 2)
    assert (both.reference, both.errors, both.rate) == (10, 4, 0.4)


def test_an_empty_reference_adds_its_insertions_to_the_total():
    found = score(["one two", ""], ["one two", "uh oh"], ids=["a", "b"])
    assert found.rate == 1.0 and found.total == Counts(2, 0, 0, 2)
    assert found.counts[1].rate == math.inf and found.counts[1].as_dict()["rate"] is None
    assert Counts().rate == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Hello,\tWORLD!\n", "hello world"),
        ("Don\u2019t \u2018quote\u2019 'tis rock 'n' roll", "don't quote tis rock n roll"),
        ("well-known 1,000 a_b", "well known 1 000 a b"),
        ("Stra\u00dfe \ufb01ne \uff21\uff22", "strasse fine ab"),
        ("cafe\u0301 co\u00adoperate", "caf\u00e9 cooperate"),
        ("\u0939\u093f\u0928\u094d\u0926\u0940\u0964", "\u0939\u093f\u0928\u094d\u0926\u0940"),
        ("... -- '", ""),
    ],
)
def test_the_basic_normaliser(text, expected):
    assert basic(text) == expected


@given(st.text())
def test_the_basic_normaliser_changes_nothing_twice(text):
    once = basic(text)
    assert basic(once) == once
    assert once == " ".join(once.split())


def test_the_whisper_normaliser_works_without_a_model_folder():
    normalise = NORMALISERS["whisper_english"]
    assert normalise("I won't pay twenty dollars, Mr. Smith [laughs]") == "i will not pay $20 mister smith"
    assert normalise("colour") == "colour", "spellings stay without the table of a model folder"
    assert whisper_english({"colour": "color"})("the colour") == "the color"


def test_scores_use_the_normaliser_they_name():
    said, heard = ["Don't stop!"], ["don't stop"]
    assert score(said, heard, ids=["u"]).rate == 0.0
    raw = score(said, heard, ids=["u"], normaliser="none")
    assert (raw.rate, raw.normaliser, raw.references) == (1.0, "none", ("Don't stop!",))
    assert score(["can't"], ["cannot"], ids=["u"], normaliser="whisper_english").rate == 1.0
    with pytest.raises(UsageError, match="normaliser = 'nope'.* use one of basic, none, whisper_english"):
        score(said, heard, ids=["u"], normaliser="nope")


def test_character_rates_count_the_spaces_between_words():
    found = score(["ab  cd"], ["abcd"], ids=["u"], unit="char")
    assert found.total == Counts(hits=4, deletions=1)
    with pytest.raises(DecodeError, match="unit = 'phone': error rates are counted in 'word' or 'char'"):
        score(["a"], ["a"], ids=["u"], unit="phone")


def table():
    return score(
        ["a b c d", "a b", "c d", "a"],
        ["a b c x", "a b", "c x", "y"],
        ids=["u1", "u2", "u3", "u4"],
        speakers=["zoe", "amy", "zoe", None],
    )


def test_rows_by_speaker_and_by_group():
    rows = table().by_speaker()
    assert [(row.group, row.utterances, row.counts.errors, row.counts.reference) for row in rows] == [
        ("amy", 1, 0, 2),
        ("zoe", 2, 2, 6),
        (None, 1, 1, 1),
    ]
    assert sum((row.counts for row in rows), Counts()) == table().total
    assert json.loads(json.dumps(rows[1].as_dict()))["rate"] == pytest.approx(1 / 3)
    assert [row.group for row in table().by_group(["x", "x", "y", "y"])] == ["x", "y"]
    with pytest.raises(DecodeError, match="groups: 1 for 4 references"):
        table().by_group(["x"])
    assert [row.group for row in score(["a"], ["a"], ids=["u"]).by_speaker()] == [None]


def test_the_most_frequent_confusions_come_first():
    assert table().confusions() == [Confusion("d", "x", 2), Confusion("a", "y", 1)]
    assert table().confusions(limit=1) == [Confusion("d", "x", 2)]


def test_a_score_is_json():
    assert json.loads(json.dumps(table().as_dict())) == {
        "unit": "word",
        "normaliser": "basic",
        "utterances": 4,
        "reference": 9,
        "errors": 3,
        "substitutions": 3,
        "deletions": 0,
        "insertions": 0,
        "rate": pytest.approx(1 / 3),
    }


def random_score(rng: np.random.Generator, utterances: int = 60, speakers: int = 60):
    """Ten words each; the rate of a speaker varies around 20 %."""
    rates = np.repeat(rng.beta(4, 16, speakers), utterances // speakers)
    wrong = rng.binomial(10, rates)
    said, heard = ["a " * 10] * utterances, ["b " * n + "a " * (10 - n) for n in wrong]
    names = [str(u) for u in range(utterances)]
    return score(said, heard, ids=names, speakers=[str(u * speakers // utterances) for u in range(utterances)])


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [low <= 0.2 <= high for low, high in (random_score(rng).interval(samples=300) for _ in range(200))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.05)


def test_the_interval_is_that_of_a_plain_bootstrap():
    found = random_score(np.random.default_rng(1))
    rng = np.random.default_rng(2)
    errors = np.array([c.errors for c in found.counts])
    means = [errors[rng.integers(60, size=60)].sum() / 600 for _ in range(5000)]
    assert found.interval() == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.004)
    assert found.interval(level=0.5)[1] < found.interval()[1]
    assert found.interval(seed=3) == found.interval(seed=3)


def test_resampling_whole_speakers_is_wider_where_speakers_differ():
    found = random_score(np.random.default_rng(3), utterances=400, speakers=20)
    (low, high), (low_s, high_s) = found.interval(), found.interval(by="speaker")
    assert high_s - low_s > 1.3 * (high - low)


def test_an_interval_needs_what_it_resamples():
    with pytest.raises(DecodeError, match="speakers: 1 of 4 utterances have no speaker"):
        table().interval(by="speaker")
    with pytest.raises(DecodeError, match="speakers: 1 of 1 utterances have no speaker"):
        score(["a"], ["a"], ids=["u"]).interval(by="speaker")
    with pytest.raises(DecodeError, match="by = 'word': intervals resample by 'utterance' or 'speaker'"):
        table().interval(by="word")
    with pytest.raises(DecodeError, match="level = 95"):
        table().interval(level=95)
    with pytest.raises(DecodeError, match="samples = 0"):
        table().interval(samples=0)


def test_an_interval_of_silent_utterances_stays_finite():
    low, high = score(["a", "", ""], ["a", "x", ""], ids=["1", "2", "3"]).interval(samples=200)
    assert 0 <= low <= high < math.inf


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=8), st.randoms())
def test_resampled_sums_ignore_the_order_of_rows_and_keep_their_number(rows, random):
    values_NC = np.array([(*row, 1) for row in rows])
    sums_MC = resampled_sums(values_NC, 50, np.random.default_rng(0))
    random.shuffle(rows)
    again_MC = resampled_sums(np.array([(*row, 1) for row in rows]), 50, np.random.default_rng(0))
    assert np.array_equal(sums_MC, again_MC)
    assert (sums_MC[:, 2] == len(rows)).all(), "every draw takes as many rows as there are"
    assert (sums_MC[:, 0] <= 5 * len(rows)).all() and sums_MC.shape == (50, 3)


def test_resampling_in_pieces_has_the_same_spread(monkeypatch):
    values_NC = np.arange(40)[:, None]
    monkeypatch.setattr("manyvoice.decode.wer.CELLS_AT_ONCE", 100)
    sums_MC = resampled_sums(values_NC, 2001, np.random.default_rng(0))
    assert sums_MC.shape == (2001, 1)
    assert sums_MC.mean() == pytest.approx(values_NC.sum(), rel=0.01)
    assert sums_MC.std() == pytest.approx(values_NC.std() * 40**0.5, rel=0.06)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"hypotheses": ["a"]}, "hypotheses: 1 for 2 references"),
        ({"ids": ["1", "2", "3"]}, "ids: 3 for 2 references"),
        ({"speakers": ["x"]}, "speakers: 1 for 2 references"),
        ({"ids": ["1", "1"]}, "ids: '1' occurs more than once"),
        ({"references": ["...", "!"]}, "references: none of 2 holds a word after the normaliser 'basic'"),
    ],
)
def test_what_cannot_be_scored_is_refused(changed, text):
    lists = {"references": ["a", "b"], "hypotheses": ["a", "b"], "ids": ["1", "2"]} | changed
    with pytest.raises(DecodeError, match=text):
        score(**lists)
