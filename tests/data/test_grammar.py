from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.data.grammar import (
    COMMANDS,
    DIGITS,
    HAKKA,
    Phrase,
    PhraseSource,
    combinations,
    expand,
    hakka_phonemes,
    length,
    read_sentences,
    share_of,
    vocabulary,
)
from manyvoice.errors import UsageError


def draw(count: int, **settings: object) -> list[Phrase]:
    given = {"grammar": "commands", "language": "en", "words": (1, 12)} | settings
    return list(itertools.islice(PhraseSource(**given).stream(random.Random(1)), count))  # type: ignore[arg-type]


@pytest.mark.parametrize("language", sorted(COMMANDS))
def test_every_symbol_is_defined_and_used(language: str) -> None:
    grammar = COMMANDS[language]
    named = {name for alternatives in grammar.values() for one in alternatives for name in re.findall(r"<(\w+)>", one)}
    assert named | {"command"} == set(grammar)
    assert all(one and one == one.strip() for alternatives in grammar.values() for one in alternatives)


def test_english_commands_have_hundreds_of_words_and_tens_of_thousands_of_sentences() -> None:
    assert len(vocabulary(COMMANDS["en"])) > 1000
    assert combinations(COMMANDS["en"]) > 100_000
    assert len({phrase.text for phrase in draw(2_000)}) > 1_500


def test_combinations_are_counted() -> None:
    grammar = {"command": ["<a> b", "c"], "a": ["x", "y <z>"], "z": ["1", "2", "3"]}
    assert combinations(grammar) == 5
    rng = random.Random(0)
    said = {" ".join(expand(grammar, rng)) for _ in range(300)}
    assert said == {"x b", "y 1 b", "y 2 b", "y 3 b", "c"}
    assert vocabulary(grammar) == frozenset("xybc123")


@pytest.mark.parametrize("language", ["cmn", "yue", "hak"])
def test_chinese_is_written_in_characters_without_spaces(language: str) -> None:
    assert combinations(COMMANDS[language]) > 10_000
    for phrase in draw(200, language=language, words=(1, 16)):
        assert re.fullmatch(r"[\u4e00-\u9fff]+", phrase.text)
        assert (phrase.phonemes is not None) == (language == "hak")


@pytest.mark.parametrize("language", sorted(DIGITS))
def test_digit_strings_have_the_asked_lengths(language: str) -> None:
    phrases = draw(200, grammar="digits", language=language, words=(2, 4))
    assert {length(phrase.text, language) for phrase in phrases} == {2, 3, 4}
    said = {word for phrase in phrases for word in (phrase.text.split() if language == "en" else phrase.text)}
    assert said == set(DIGITS[language])


def test_all_hakka_words_have_a_reading() -> None:
    words = vocabulary(COMMANDS["hak"]) | set(DIGITS["hak"])
    assert words == set(HAKKA)
    assert hakka_phonemes(["電火", "五"]) == "th·ien4 f·o3 N-3"
    for word, reading in HAKKA.items():
        assert len(reading.split()) == len(word), word
    with pytest.raises(UsageError, match="no Hakka reading for 鯨; Hakka speaks digits and commands only"):
        hakka_phonemes(["鯨"])


@given(low=st.integers(2, 8), more=st.integers(0, 6))
def test_commands_keep_to_the_range_of_lengths(low: int, more: int) -> None:
    assert all(low <= length(phrase.text, "en") <= low + more for phrase in draw(5, words=(low, low + more)))


def test_parts_of_the_phrases_are_disjoint_and_together_everything() -> None:
    parts = [(0.0, 0.6), (0.6, 0.9), (0.9, 1.0)]
    said = [{phrase.text for phrase in draw(300, words=(1, 1), grammar="digits", part=part)} for part in parts]
    assert sum(map(len, said)) == 10 and set().union(*said) == set(DIGITS["en"])
    assert abs(sum(share_of(str(i), 0) < 0.3 for i in range(2_000)) / 2_000 - 0.3) < 0.04
    assert share_of("A  b", 1) == share_of("a b", 1) != share_of("a b", 2)


def test_a_range_without_phrases_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyvoice.data.grammar._TRIES", 50)
    with pytest.raises(UsageError, match=r"words = \(90, 99\): grammar 'commands' in 'en' has no such phrase"):
        draw(1, words=(90, 99))


def test_sentences_are_filtered_by_length_and_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat\nthe  cat sat\n\nthe dog\nthe cat\na very rare aardvark sat on it\n")
    assert read_sentences(path, "en", (2, 3)) == ["the cat sat", "the dog", "the cat"]
    assert read_sentences(path, "en", (2, 3), most_frequent=3) == ["the cat sat", "the cat"]
    with pytest.raises(UsageError, match=r"text = .*no phrase has 2 to 3 words within vocabulary = 1; widen either"):
        read_sentences(path, "en", (2, 3), most_frequent=1)
    with pytest.raises(UsageError, match=r"nowhere.txt.*cannot be read as UTF-8 text"):
        read_sentences(tmp_path / "nowhere.txt", "en", (2, 3))


def test_chinese_sentences_count_characters(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("打开灯\n打开\n关灯\n", encoding="utf-8")
    assert read_sentences(path, "cmn", (2, 2)) == ["打开", "关灯"]
    assert read_sentences(path, "cmn", (1, 9), most_frequent=3) == ["打开灯", "打开"]


def test_sentences_come_again_only_when_all_have_been_said() -> None:
    lines = ["one a", "two b", "three c"]
    said = [phrase.text for phrase in draw(9, grammar="sentences", sentences=lines)]
    assert [sorted(said[i : i + 3]) for i in (0, 3, 6)] == [sorted(lines)] * 3
    with pytest.raises(UsageError, match="grammar 'sentences'"):
        draw(1, grammar="sentences", sentences=[])
