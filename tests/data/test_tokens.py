"""Tokenizers of every kind: what goes in comes out, and stock Transformers agrees."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from manyvoice.data.tokens import BLANK, UNKNOWN, Tokenizer, TokenizerKind, train_tokenizer
from manyvoice.errors import ModelError

LINES = [
    "It's the dog's house, isn't it?",
    "Turn ON the light!",
    "zero one two three four five six seven eight nine",
    "the quick brown fox jumps over the lazy dog",
    "Ein schöner Tag – sagt er",
] * 3
KINDS: list[TokenizerKind] = ["words", "characters", "sentencepiece"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(LINES, request.param, size=60)


def test_what_goes_in_comes_out(tokenizer: Tokenizer) -> None:
    for line in LINES:
        assert tokenizer.decode(tokenizer.encode(line)) == tokenizer.normalise(line)
        assert not tokenizer.unknown(line)


def test_unknown_is_first_and_the_blank_last(tokenizer: Tokenizer) -> None:
    assert tokenizer.strings[0] == UNKNOWN
    assert tokenizer.strings[-1] == BLANK
    assert tokenizer.blank == len(tokenizer) - 1


def test_stock_transformers_reads_the_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    stock, again = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for line in LINES[:5]:
        ids = tokenizer.encode(line)
        assert stock(line)["input_ids"] == again.encode(line) == ids
        # stock decoding collapses repeats, as CTC does, so blanks go between
        spaced = [i for token in ids for i in (token, tokenizer.blank)]
        assert stock.decode(spaced).strip() == tokenizer.decode(ids)


@given(text=st.text(alphabet="abcdefghijklmnop tuvxyz'", min_size=1))
def test_any_text_of_known_letters_survives(text: str) -> None:
    tokenizer = CHARACTERS
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.normalise(text)


CHARACTERS = train_tokenizer(["abcdefghijklmnop", "tuvxyz it's"], "characters")


def test_normalising_keeps_letters_of_any_script_and_inner_apostrophes(tokenizer: Tokenizer) -> None:
    said = tokenizer.normalise("  “It’s” 'tis — naïve, 你好! ｆｕｌｌ ")
    assert said == "it's tis naïve 你好 full"


def test_pieces_are_those_of_sentencepiece_itself() -> None:
    model = io.BytesIO()
    tokenizer = train_tokenizer(LINES, "sentencepiece", size=60)
    lines = [tokenizer.normalise(line) for line in LINES]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=59, model_type="unigram", bos_id=-1, eos_id=-1,
        hard_vocab_limit=False,
        normalization_rule_name="identity", character_coverage=1.0, num_threads=1, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for line in lines:
        assert tokenizer.encode(line) == pieces.encode(line)


def test_equal_corpora_give_equal_tokenizers(tokenizer: Tokenizer) -> None:
    assert any(train_tokenizer(LINES, kind, size=60).strings == tokenizer.strings for kind in KINDS)


def test_unknown_names_what_stands_in_the_text() -> None:
    assert CHARACTERS.unknown("Abç 中") == {"ç", "中"}
    assert train_tokenizer(["one two"], "words").unknown("One THREE") == {"THREE"}


def test_a_small_corpus_gives_fewer_pieces_than_asked_for() -> None:
    assert 5 < len(train_tokenizer(["turn on the light"], "sentencepiece", size=256)) < 60


def test_the_most_frequent_words_are_kept() -> None:
    tokenizer = train_tokenizer(["a a a b b c"], "words", size=2)
    assert tokenizer.strings == [UNKNOWN, "a", "b", BLANK]


@pytest.mark.parametrize(
    ("lines", "kind", "size", "text"),
    [
        ([], "words", 9, "a tokenizer needs text"),
        (["?!"], "characters", 9, "a tokenizer needs text"),
        (["abcdefgh"], "sentencepiece", 4, r"tokenizer\.size = 4: sentencepiece says .*; choose another size"),
    ],
)
def test_what_cannot_be_learned_is_said(lines: list[str], kind: TokenizerKind, size: int, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        train_tokenizer(lines, kind, size=size)
