import html
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.decode.align import Word
from manyvoice.decode.subtitles import Segment, SubtitleOptions, segments, to_srt, to_vtt
from manyvoice.errors import DecodeError
from manyvoice.types import Seconds


def say(*timed):
    return [Word(text=text, start=Seconds(start), end=Seconds(end), confidence=1.0) for text, start, end in timed]


def evenly(text, step=0.5):
    return say(*((word, n * step, (n + 1) * step) for n, word in enumerate(text.split())))


def seconds(clock):
    hours, minutes, rest = clock.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def parse(text, point):
    """A plain reader of both formats: cues as (start, end, lines)."""
    time = rf"(\d\d+:[0-5]\d:[0-5]\d\{point}\d\d\d)"
    cues = []
    for block in filter(None, text.strip("\n").split("\n\n")):
        head, *rest = block.split("\n")
        if block == "WEBVTT":
            continue
        if point == ",":
            assert head == str(len(cues) + 1)
            head, *rest = rest
        match = re.fullmatch(rf"{time} --> {time}", head)
        assert match, head
        cues.append((seconds(match[1]), seconds(match[2]), tuple(rest)))
    return cues


def test_srt_to_the_letter():
    found = [
        Segment(start=Seconds(0.0), end=Seconds(1.5), lines=("hello", "a < b & c")),
        Segment(start=Seconds(3661.0005), end=Seconds(360000.25), lines=("late",)),
    ]
    assert to_srt(found) == (
        "1\n00:00:00,000 --> 00:00:01,500\nhello\na < b & c\n\n2\n01:01:01,001 --> 100:00:00,250\nlate\n"
    )


def test_vtt_to_the_letter():
    found = [
        Segment(start=Seconds(0.0), end=Seconds(1.5), lines=("hello", "a < b & c -->")),
        Segment(start=Seconds(59.9996), end=Seconds(61.0), lines=("later",)),
    ]
    assert to_vtt(found) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nhello\na &lt; b &amp; c --&gt;\n\n"
        "00:01:00.000 --> 00:01:01.000\nlater\n"
    )


def test_nothing_said():
    assert segments([]) == []
    assert to_srt([]) == ""
    assert to_vtt([]) == "WEBVTT\n"


def test_lines_fill_and_segments_follow():
    found = segments(evenly("aaa bbb ccc ddd eee"), SubtitleOptions(max_chars=7, max_lines=2))
    assert [segment.lines for segment in found] == [("aaa bbb", "ccc ddd"), ("eee",)]
    assert [(segment.start, segment.end) for segment in found] == [(0.0, 2.0), (2.0, pytest.approx(2.0 + 5 / 6))]


def test_a_word_of_one_frame_stays_long_enough_to_be_read():
    (short,) = segments(say(("yes", 1.0, 1.04)))
    assert (short.start, short.end) == (1.0, pytest.approx(1.0 + 5 / 6))
    (long,) = segments(say(("a" * 34, 1.0, 1.04)))
    assert long.end == pytest.approx(1.0 + 34 / 17)
    (limited,) = segments(say(("a" * 34, 1.0, 1.04)), SubtitleOptions(max_seconds=Seconds(1.5)))
    assert limited.end == 2.5
    one, two = segments(say(("yes", 0.0, 0.04), ("no", 0.5, 0.54)), SubtitleOptions(max_chars=3, max_lines=1))
    assert (one.end, two.end) == (0.5, pytest.approx(0.5 + 5 / 6))
    (bare,) = segments(say(("yes", 1.0, 1.04)), SubtitleOptions(min_seconds=Seconds(0), chars_per_second=math.inf))
    assert bare.end == 1.04


def test_a_pause_ends_a_segment():
    words = say(("one", 0, 1), ("two", 1.7, 2), ("three", 2.8, 3))
    found = segments(words, SubtitleOptions(pause=Seconds(0.8)))
    assert [segment.lines for segment in found] == [("one two",), ("three",)]


def test_a_segment_lasts_no_longer_than_allowed():
    found = segments(evenly("a b c d e"), SubtitleOptions(max_seconds=Seconds(1.0)))
    assert [segment.lines for segment in found] == [("a b",), ("c d",), ("e",)]


def test_a_word_too_long_for_any_limit_stands_alone():
    words = say(("a", 0, 1), ("extraordinary", 1, 9), ("b", 9, 10))
    found = segments(words, SubtitleOptions(max_chars=5, max_seconds=Seconds(2)))
    assert [segment.lines for segment in found] == [("a",), ("extraordinary",), ("b",)]


def test_overlapping_words_never_overlap_on_the_screen():
    found = segments(say(("a", 0, 3), ("b", 2, 5)), SubtitleOptions(max_seconds=Seconds(3)))
    assert [(segment.start, segment.end) for segment in found] == [(0, 2), (2, 5)]


def test_a_line_break_in_a_word_cannot_break_the_file():
    (found,) = segments(say(("a\n\nb", 0, 1)))
    assert found.lines == ("a b",)


def test_a_cue_of_no_length_lasts_a_millisecond():
    none = SubtitleOptions(min_seconds=Seconds(0), chars_per_second=math.inf)
    assert "00:00:01.000 --> 00:00:01.001" in to_vtt(segments(say(("a", 1, 1)), none))


def test_nothing_is_on_the_screen_when_the_sound_has_ended():
    spoken = say(("a" * 34, 1.0, 1.04), ("b" * 34, 2.0, 2.04))
    assert [s.end for s in segments(spoken)] == [2.0, 4.0]
    assert [s.end for s in segments(spoken, length=Seconds(2.35))] == [2.0, 2.35]
    # a frame may end after the last sample
    assert [s.end for s in segments(spoken, length=Seconds(2.03))] == [2.0, 2.03]
    assert [(s.start, s.end) for s in segments(spoken, length=Seconds(1.5))] == [(1.0, 1.5), (2.0, 2.0)]


@given(
    spoken=st.lists(
        st.tuples(st.text("ab&<>é", min_size=1, max_size=9), st.integers(0, 3000), st.integers(1, 4000)), max_size=20
    ),
    max_chars=st.integers(1, 12),
    max_lines=st.integers(1, 3),
)
def test_what_is_written_is_what_was_said(spoken, max_chars, max_lines):
    words, now = [], 0
    for text, gap, held in spoken:
        words.append(
            Word(text=text, start=Seconds((now + gap) / 1000), end=Seconds((now + gap + held) / 1000), confidence=1.0)
        )
        now += gap + held
    options = SubtitleOptions(max_chars=max_chars, max_lines=max_lines)
    found = segments(words, options)
    assert " ".join(line for segment in found for line in segment.lines) == " ".join(word.text for word in words)
    for segment in found:
        assert len(segment.lines) <= max_lines
        assert all(len(line) <= max_chars or " " not in line for line in segment.lines)
        one_word = sum(len(line.split()) for line in segment.lines) == 1
        assert one_word or segment.end - segment.start <= options.max_seconds + 1e-6
    expected = [(pytest.approx(s.start, abs=5.1e-4), pytest.approx(s.end, abs=5.1e-4), s.lines) for s in found]
    assert parse(to_srt(found), ",") == expected
    vtt = [(start, end, tuple(map(html.unescape, lines))) for start, end, lines in parse(to_vtt(found), ".")]
    assert vtt == expected
    assert not re.search("[<>]", to_vtt(found).replace(" --> ", ""))


@pytest.mark.parametrize(
    "words", [say(("a", 2, 3), ("b", 1, 4)), say(("a", 2, 1)), say(("a", -1, 1)), say(("a", float("nan"), 1))]
)
def test_times_out_of_order_are_refused(words):
    with pytest.raises(DecodeError, match=r"words\[\d\] is '.' from .* must end after it starts"):
        segments(words)


@pytest.mark.parametrize("field", ["max_chars", "max_lines", "max_seconds", "pause"])
def test_limits_must_let_something_through(field):
    with pytest.raises(DecodeError, match=rf"SubtitleOptions\.{field} must be .* but is 0"):
        SubtitleOptions(**{field: 0})


@pytest.mark.parametrize("field", ["min_seconds", "chars_per_second"])
def test_a_segment_is_held_for_a_sensible_time(field):
    with pytest.raises(DecodeError, match=rf"SubtitleOptions\.{field} must be .* but is -1"):
        SubtitleOptions(**{field: -1})
