import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.decode.fusion import Fusion, Hotwords, TokenModel, WordModel, WordScore
from manyvoice.decode.lm import MISSING_UNK, NGram, train_ngram
from manyvoice.decode.pieces import letters, spell
from manyvoice.errors import DecodeError

STRINGS = ("", "▁a", "▁b", "a", "b", "▁", "▁ab")
PREFIXES = st.lists(st.integers(1, len(STRINGS) - 1), max_size=7)
WORD_LM = train_ngram(["a b ab", "ab b", "aa ab a", "b a"], 3)
TOKEN_LM = train_ngram(["▁a ▁b b", "▁ab a ▁a", "▁b ▁ ▁a"], 3)


def total(part, tokens):
    """What the part gives in all, added up token by token as the search does."""
    state, score = part.start(), 0.0
    for token in tokens:
        score += float(part.row_V(state)[token])
        state = part.step(state, token)
    return score + part.close(state)


@given(tokens=PREFIXES)
def test_words_as_they_are_spelled_are_the_sentence(tokens):
    words = spell(tokens, STRINGS, "prefix").split()
    assert total(WordModel(WORD_LM, 0.7, STRINGS), tokens) == pytest.approx(0.7 * WORD_LM.sentence(words), abs=1e-9)


@given(tokens=PREFIXES)
def test_tokens_one_by_one_are_the_sentence(tokens):
    expected = 0.7 * TOKEN_LM.sentence([STRINGS[token] for token in tokens])
    assert total(TokenModel(TOKEN_LM, 0.7, STRINGS), tokens) == pytest.approx(expected, abs=1e-9)


def test_a_row_is_the_score_of_each_token_unknown_ones_too():
    for unk in (True, False):
        lm = TOKEN_LM
        if not unk:
            follow = {c: {w: p for w, p in words.items() if w != "<unk>"} for c, words in lm.follow.items()}
            lm = NGram(order=3, follow=follow, backoff=lm.backoff)
        part = TokenModel(lm, 0.5, (*STRINGS, "never", "seen"))
        for context in lm.follow:
            row_V = part.row_V(context)
            assert row_V[-1] == row_V[-2] == pytest.approx(0.5 * lm.score(context, "seen"))
            assert (row_V[-1] == 0.5 * MISSING_UNK) is not unk
            for token, string in enumerate(STRINGS):
                assert row_V[token] == pytest.approx(0.5 * lm.score(context, string))


@given(tokens=PREFIXES)
def test_word_score_counts_words(tokens):
    words = spell(tokens, STRINGS, "prefix").split()
    assert total(WordScore(1.5, STRINGS, "prefix"), tokens) == pytest.approx(1.5 * len(words))
    spelled = [token for token in tokens if letters(STRINGS[token], "every")]
    assert total(WordScore(1.5, STRINGS, "every"), tokens) == pytest.approx(1.5 * len(spelled))


def occurrences(phrase, words):
    parts = phrase.split()
    return sum(words[n : n + len(parts)] == parts for n in range(len(words)))


@given(
    tokens=PREFIXES,
    weights=st.dictionaries(
        st.lists(st.sampled_from(["a", "b", "ab", "aab"]), min_size=1, max_size=3).map(" ".join),
        st.sampled_from([0.5, 1.0, 3.0]),
        min_size=1,
        max_size=4,
    ),
)
def test_a_finished_hypothesis_has_its_phrases_and_no_loan(tokens, weights):
    words = spell(tokens, STRINGS, "prefix").split()
    expected = sum(weight * occurrences(phrase, words) for phrase, weight in weights.items())
    assert total(Hotwords(weights, STRINGS, "prefix"), tokens) == pytest.approx(expected, abs=1e-9)


def test_a_phrase_lends_while_it_is_spelled_and_takes_back():
    part = Hotwords({"ab a": 4.0}, STRINGS, "prefix")
    ab = part.step(part.start(), 6)
    assert part.row_V(part.start())[6] == pytest.approx(4.0 * 2 / 5), "two letters of five, spaces counted"
    assert part.row_V(ab)[1] == pytest.approx(4.0 * 2 / 5)
    assert part.row_V(ab)[2] == pytest.approx(-4.0 * 2 / 5), "another word follows: the loan is paid back"
    assert part.row_V(ab)[4] == pytest.approx(-4.0 * 2 / 5), "the word goes on: it was another word"
    assert part.close(ab) == pytest.approx(-4.0 * 2 / 5)


def test_a_loan_counts_a_phrase_that_began_inside_another():
    part = Hotwords({"ab b b": 0.4, "b a": 8.0}, STRINGS, "prefix")
    state = part.step(part.step(part.start(), 6), 2)
    assert part.close(state) == pytest.approx(-8.0 * 1 / 4)


def test_two_spaces_in_a_phrase_are_one():
    part = Hotwords({"a b": 2.0}, STRINGS, "prefix")
    assert total(part, [5, 1, 5, 5, 2, 5]) == pytest.approx(2.0)


def test_hotwords_where_every_token_is_a_word():
    part = Hotwords({"new york": 2.0}, ["new", "york", "er", ""], "every")
    assert total(part, [0, 1]) == pytest.approx(2.0)
    assert total(part, [0, 1, 0, 1]) == pytest.approx(4.0)
    assert total(part, [0, 2, 1]) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({" ": 1.0}, "hotwords hold ' ', which has no letters"),
        ({"a": 0.0}, r"hotwords\['a'\] is 0.0, but a weight must be a positive number"),
        ({"a": math.nan}, r"hotwords\['a'\] is nan"),
        ({"a b Ab": 1.0}, "hotwords hold 'a b Ab', but no token spells 'A'"),
    ],
)
def test_hotwords_that_cannot_be_boosted(weights, message):
    with pytest.raises(DecodeError, match=message):
        Hotwords(weights, STRINGS, "prefix")


def test_the_sum_of_the_parts():
    parts = [
        WordModel(WORD_LM, 0.5, STRINGS),
        WordScore(1.0, STRINGS, "prefix"),
        Hotwords({"ab": 2.0}, STRINGS, "prefix"),
    ]
    fusion = Fusion(parts, len(STRINGS))
    for tokens in ([], [6], [1, 4, 2], [5, 5, 1]):
        assert total(fusion, tokens) == pytest.approx(sum(total(part, tokens) for part in parts))
    assert np.array_equal(Fusion([], 3).row_V(()), np.zeros(3))
