"""Words in time as subtitles: SubRip (.srt) and WebVTT (https://www.w3.org/TR/webvtt1/).

A CTC model says a token in one frame or two, at its most certain, so a word of one token may span 40 ms. The times of
words stay as they are; a segment stays on the screen longer than its words, long enough to be read (`segments`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from manyvoice.decode.align import Word
from manyvoice.errors import DecodeError
from manyvoice.types import Seconds

# Times are multiples of a frame in floating point: 2.8 - 2.0 must be a pause of 0.8.
ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class SubtitleOptions:
    """When a segment ends. A single word is never split, whatever the limits.

    The defaults are those of Netflix's Timed Text Style Guide for English templates.

    Args:
        max_chars: characters in a line.
        max_lines: lines in a segment.
        max_seconds: from the first word's start to the last word's end.
        pause: silence between two words, in seconds, that ends a segment; 0.8 s is ours.
        min_seconds: on the screen after the last word's start; 0 does not hold a segment.
        chars_per_second: reading speed, spaces counted; infinity does not hold a segment.
    """

    max_chars: int = 42
    max_lines: int = 2
    max_seconds: Seconds = Seconds(7.0)
    pause: Seconds = Seconds(0.8)
    min_seconds: Seconds = Seconds(5 / 6)
    chars_per_second: float = 17.0

    def __post_init__(self) -> None:
        for name, least in (("max_chars", 1), ("max_lines", 1)):
            if getattr(self, name) < least:
                raise DecodeError(f"SubtitleOptions.{name} must be {least} or more, but is {getattr(self, name)}")
        for name in ("max_seconds", "pause"):
            if not getattr(self, name) > 0:
                raise DecodeError(f"SubtitleOptions.{name} must be above 0 seconds, but is {getattr(self, name)}")
        if not 0 <= self.min_seconds < math.inf:
            raise DecodeError(f"SubtitleOptions.min_seconds must be 0 or more seconds, but is {self.min_seconds}")
        if not self.chars_per_second > 0:
            raise DecodeError(f"SubtitleOptions.chars_per_second must be above 0, but is {self.chars_per_second}")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What is on the screen from start to end."""

    start: Seconds
    end: Seconds
    lines: tuple[str, ...]


def segments(
    words: Sequence[Word], options: SubtitleOptions | None = None, *, length: Seconds | None = None
) -> list[Segment]:
    """Words gathered into segments, each as long as the options allow, and held long enough to be read.

    A segment ends with its last word, or later: ``min_seconds`` after that word's start, or when all its characters
    have been read at ``chars_per_second``. Holding it never takes it past the start of the next segment, nor past
    ``max_seconds``, nor past ``length``.

    Args: length: of the recording; None if nobody knows.
    Raises: DecodeError if a word ends before it starts, or starts before the one in front of it.
    """
    options = options or SubtitleOptions()
    _check_order(words)
    groups: list[list[Word]] = []
    for word in words:
        if groups and _fits([*groups[-1], word], options):
            groups[-1].append(word)
        else:
            groups.append([word])
    found = []
    for n, group in enumerate(groups):
        lines = _lines(group, options.max_chars)
        end = _held(group, lines, options)
        # Two segments are never on the screen at once, even if their words overlap.
        end = min(end, groups[n + 1][0].start) if n + 1 < len(groups) else end
        end = end if length is None else max(group[0].start, min(end, length))
        found.append(Segment(start=group[0].start, end=end, lines=lines))
    return found


def to_srt(segments: Sequence[Segment]) -> str:
    """SubRip text: numbered from 1, ``00:00:00,000``; SubRip has no escapes, so the words stand as they are."""
    cues = [
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n" + "\n".join(segment.lines) + "\n"
        for number, (segment, start, end) in enumerate(_timed(segments), start=1)
    ]
    return "\n".join(cues)


def to_vtt(segments: Sequence[Segment]) -> str:
    """WebVTT text: ``00:00:00.000``, hours always written, ``&``, ``<`` and ``>`` escaped."""
    cues = [
        f"{_clock(start, '.')} --> {_clock(end, '.')}\n" + "\n".join(map(_escape, segment.lines)) + "\n"
        for segment, start, end in _timed(segments)
    ]
    return "\n".join(["WEBVTT\n", *cues])


def _check_order(words: Sequence[Word]) -> None:
    before = Seconds(0.0)
    for n, word in enumerate(words):
        if not before <= word.start <= word.end < math.inf:
            raise DecodeError(
                f"words[{n}] is {word.text!r} from {word.start} to {word.end} s, but must end after it starts"
                f" and start at or after {before} s; sort the words by their start"
            )
        before = word.start


def _fits(words: Sequence[Word], options: SubtitleOptions) -> bool:
    last, word = words[-2:]
    if word.start - last.end > options.pause - ROUNDING or word.end - words[0].start > options.max_seconds + ROUNDING:
        return False
    lines = _lines(words, options.max_chars)
    return len(lines) <= options.max_lines and all(len(line) <= options.max_chars for line in lines)


def _held(words: Sequence[Word], lines: Sequence[str], options: SubtitleOptions) -> Seconds:
    """When the last word has ended and all has been read."""
    start, end = words[0].start, max(word.end for word in words)
    read = start + len(" ".join(lines)) / options.chars_per_second
    wanted = max(end, words[-1].start + options.min_seconds, read)
    return Seconds(max(end, min(wanted, start + options.max_seconds)))


def _lines(words: Sequence[Word], max_chars: int) -> tuple[str, ...]:
    """Lines filled from the left; white space in a word counts as a space, so that no line can be empty."""
    lines: list[str] = []
    for text in " ".join(word.text for word in words).split():
        if lines and len(lines[-1]) + 1 + len(text) <= max_chars:
            lines[-1] += " " + text
        else:
            lines.append(text)
    return tuple(lines)


def _timed(segments: Sequence[Segment]) -> list[tuple[Segment, int, int]]:
    """Start and end in milliseconds, rounded half up; a cue lasts one at least, as WebVTT demands end > start."""
    times = [(int(s.start * 1000 + 0.5), int(s.end * 1000 + 0.5)) for s in segments]
    return [(s, start, max(end, start + 1)) for s, (start, end) in zip(segments, times, strict=True) if s.lines]


def _clock(milliseconds: int, point: str) -> str:
    seconds, ms = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{point}{ms:03d}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
