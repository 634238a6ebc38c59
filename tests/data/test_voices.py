from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.data.espeak import SEPARATOR
from manyvoice.data.voices import (
    DIALECTS,
    ENGLISH,
    PROCESSES,
    Atypical,
    Speaker,
    draw_speakers,
    language_of,
    script,
    speaker_split,
    substitute,
)
from manyvoice.errors import UsageError

ANNA = Speaker(dialect="en-gb", variant="f3", pitch=50, pitch_range=80, rate=170)
LISP = Atypical(processes=("lisp",), substitutions=(("s", "T"),), pause_probability=1.0, pause_ms=(100, 200))


def test_a_speaker_is_the_same_however_many_are_drawn() -> None:
    few = draw_speakers(3, tuple(DIALECTS), seed=5, atypical=1)
    many = draw_speakers(30, tuple(DIALECTS), seed=5, atypical=1)
    assert many[:3] == few
    assert len({speaker.name for speaker in many}) == 30
    assert not {s.name for s in many} & {s.name for s in draw_speakers(30, tuple(DIALECTS), seed=6)}


def test_a_name_is_stable_and_says_dialect_and_variant() -> None:
    assert ANNA.name == "en-gb-f3-2c6941"
    assert replace(ANNA, pitch=51).name != ANNA.name
    assert ANNA.voice == "gmw/en+f3"


def test_dialects_come_in_turn_and_the_first_speakers_are_atypical() -> None:
    drawn = draw_speakers(16, tuple(ENGLISH), seed=0, atypical=2)
    assert [speaker.dialect for speaker in drawn] == [*ENGLISH, *ENGLISH]
    assert [speaker.atypical is not None for speaker in drawn] == [True] * 2 + [False] * 14
    assert max(s.rate for s in drawn[:2]) < min(s.rate for s in drawn[2:])


@pytest.mark.parametrize("language", sorted(PROCESSES))
def test_atypical_speakers_have_processes_of_their_language(language: str) -> None:
    dialect = next(d for d in DIALECTS if language_of(d) == language)
    for speaker in draw_speakers(12, [dialect], seed=1, atypical=12):
        assert speaker.atypical is not None
        assert len(speaker.atypical.processes) >= 2 and set(speaker.atypical.processes) <= set(PROCESSES[language])
        assert all(heard != said for heard, said in speaker.atypical.substitutions)


def test_an_unknown_dialect_is_refused() -> None:
    with pytest.raises(UsageError, match="dialects: 'en-mars' is unknown; use some of en-gb"):
        language_of("en-mars")


def test_substitution_keeps_stress_and_is_not_chained() -> None:
    phonemes = SEPARATOR.join(["s", "'I", "N", "s"]) + " " + SEPARATOR.join(["'T", "I", "n"])
    assert substitute(phonemes, {"s": "T", "T": "t", "N": "n"}) == ["T'InT", "'tIn"]
    assert substitute(phonemes, {}) == ["s'INs", "'TIn"]


def test_text_is_escaped_and_cannot_smuggle_phonemes() -> None:
    ssml = script(ANNA, "R&B <b> [[[x]]", None, random.Random(0))
    assert ssml == '<prosody range="80%">R&amp;B &lt;b&gt; [ [ [x]] </prosody>'


def test_phonemes_stand_in_brackets_clear_of_the_tag() -> None:
    assert script(ANNA, "", f"s{SEPARATOR}'i: m", random.Random(0)) == '<prosody range="80%">[[s\'i: m]] </prosody>'


def test_an_atypical_speaker_pauses_between_words() -> None:
    ssml = script(replace(ANNA, atypical=LISP), "", f"s{SEPARATOR}'i: m s", random.Random(0))
    assert re.findall(r"\[\[(.*?)\]\]", ssml) == ["T'i:", "m", "T"]
    pauses = [int(ms) for ms in re.findall(r'<break time="(\d+)ms"/>', ssml)]
    assert len(pauses) == 2 and all(100 <= ms <= 200 for ms in pauses)


@given(
    typical=st.integers(0, 40),
    atypical=st.integers(0, 10),
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    seed=st.integers(0, 5),
)
def test_every_speaker_is_dealt_to_one_split_and_no_split_is_empty(
    typical: int, atypical: int, weights: list[int], seed: int
) -> None:
    speakers = [replace(ANNA, rate=i) for i in range(typical)]
    speakers += [replace(ANNA, rate=i, atypical=LISP) for i in range(atypical)]
    splits = {str(i): weight / sum(weights) for i, weight in enumerate(weights)}
    if len(speakers) < len(splits):
        with pytest.raises(UsageError, match=f"speakers = {len(speakers)}: {len(splits)} splits"):
            speaker_split(speakers, splits, seed)
        return
    dealt = speaker_split(speakers, splits, seed)
    assert sorted(s.name for group in dealt.values() for s in group) == sorted(s.name for s in speakers)
    assert all(dealt.values())
    for name, share in splits.items():
        assert abs(len(dealt[name]) - share * len(speakers)) <= 2 + len(splits)
