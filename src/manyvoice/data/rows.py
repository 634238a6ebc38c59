"""A row of any manifest, whatever its columns are called, becomes the fields of an utterance.

Every format reads its row into a mapping and comes here, so names, rules and messages are the same for all.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manyvoice.data.utterance import Audio, FileAudio, Utterance
from manyvoice.errors import CorpusError
from manyvoice.types import Seconds

COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "audio_filepath": ("path", "audio", "file", "audio_path", "filename", "wav"),
    "text": ("sentence", "transcript", "transcription"),
    "duration": (),
    "offset": (),
    "channel": (),
    "id": ("utt_id", "utterance_id"),
    "speaker": ("speaker_id", "client_id"),
    "label": (),
    "language": ("lang", "locale"),
}
SOUNDS: Final = frozenset(
    {".wav", ".flac", ".ogg", ".opus", ".mp3", ".oga", ".sph", ".aiff", ".aif", ".au", ".caf", ".w64", ".rf64"}
)
_ALIASES: Final = frozenset(alias for aliases in COLUMNS.values() for alias in aliases)
_WAYS: Final = {
    "audio_filepath": "name the sound file, relative to the manifest",
    "text": "write what is said, or give a `label`",
    "duration": "correct it, or leave the column out to take it from the file",
    "offset": "correct it, or leave the column out to use the whole file",
    "channel": "correct it, or leave the column out to average the channels",
}


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What one row says, checked; ``duration`` None means that only the sound knows."""

    where: str
    path: str | None
    text: str
    duration: Seconds | None
    offset: Seconds | None
    channel: int | None
    id: str | None
    speaker: str | None
    label: str | None
    language: str | None
    extra: Mapping[str, object]

    def file(self, folder: str) -> FileAudio:
        """The sound file it names, a relative path from ``folder``. Raises: CorpusError if it names none."""
        if self.path is None:
            raise wrong(self.where, "audio_filepath", None, "must be a path")
        return FileAudio(Path(os.path.join(folder, self.path)), self.offset, self.duration, self.channel)

    def utterance(self, audio: Audio, duration: Seconds, id: str) -> Utterance:
        """The row with its sound; ``duration`` and ``id`` stand in where the row has none."""
        return Utterance(
            id=id if self.id is None else self.id,
            audio=audio,
            duration=duration if self.duration is None else self.duration,
            text=self.text,
            speaker=self.speaker,
            label=self.label,
            language=self.language,
            extra=self.extra,
            where=self.where,
        )


def parse_json(line: bytes, where: str) -> dict[str, object]:
    """One JSON object. Raises: CorpusError."""
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is legal JSON but no text
    except UnicodeError as error:
        raise CorpusError(f"{where}: is not UTF-8 text: {error}; save the manifest as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: is not one JSON object: {error}; write one object per line") from error
    if not isinstance(row, dict):
        way = "write one object per line (jq -c '.[]' splits a list)"
        raise CorpusError(f"{where}: is not one JSON object but {shorten(row)}; {way}")
    return row


def parse(row: Mapping[str, object], where: str) -> Fields:
    """Check the columns of a row. Raises: CorpusError that names the column, its value, the rule and the way out."""
    got, extra = _columns(row)
    label = _name(where, "label", got.get("label"))
    return Fields(
        where=where,
        path=_path(where, got.get("audio_filepath")),
        text=_text(where, got.get("text"), label),
        duration=_seconds(
            where, "duration", got.get("duration"), "must be a positive number of seconds", math.ulp(0.0)
        ),
        offset=_seconds(where, "offset", got.get("offset"), "must be zero or more seconds", 0.0),
        channel=_channel(where, got.get("channel")),
        id=_name(where, "id", got.get("id")),
        speaker=_name(where, "speaker", got.get("speaker")),
        label=label,
        language=_name(where, "language", got.get("language")),
        extra=extra,
    )


def id_of(path: str, offset: Seconds | None, folder: str = "") -> str:
    """A name from the path as the manifest writes it, so that it survives a move; a segment adds where it starts."""
    if path.startswith(folder + "/"):
        path = path[len(folder) + 1 :]
    stem, end = os.path.splitext(path.removeprefix("./"))
    name = stem if end.lower() in SOUNDS else stem + end
    return name if offset is None else f"{name}@{round(offset, 6)!r}"


def wrong(where: str, column: str, value: object, rule: str) -> CorpusError:
    """The one form of complaint about a column."""
    said = f"{column} is missing" if value is None else f"{column} = {shorten(value)}"
    return CorpusError(f"{where}: {said}: {rule}; {_WAYS.get(column, 'correct it, or leave the column out')}")


def shorten(value: object, limit: int = 80) -> str:
    """A value as it fits in a message."""
    try:
        shown = repr(value) if not isinstance(value, str) else repr(value[: limit + 1])
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def _columns(row: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Our columns, by their own name or else the first alias of theirs, and the rest."""
    got: dict[str, object] = {}
    extra: dict[str, object] = {}
    aliased = False
    for name, value in row.items():
        if name in COLUMNS:
            if value is not None:
                got[name] = value
        else:
            aliased |= name in _ALIASES
            extra[name] = value
    if aliased:
        for column, aliases in COLUMNS.items():
            alias = next((n for n in aliases if extra.get(n) is not None), None)
            if column not in got and alias is not None:
                got[column] = extra.pop(alias)
    return got, extra


def _path(where: str, value: object) -> str | None:
    if value is None or (isinstance(value, str) and value.strip() and "\0" not in value):
        return value
    raise wrong(where, "audio_filepath", value, "must be a path")


def _text(where: str, value: object, label: str | None) -> str:
    if value is None and label is not None:
        return ""
    if not isinstance(value, str):
        raise wrong(where, "text", value, "must be a string")
    return value


def _name(where: str, column: str, value: object) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**40:
        return str(value)
    raise wrong(where, column, value, "must be a string or a whole number")


def _seconds(where: str, column: str, value: object, rule: str, least: float) -> Seconds | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1e9:
        raise wrong(where, column, value, rule)
    return Seconds(float(value))


def _channel(where: str, value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1024):
        return value
    raise wrong(where, "channel", value, "must be a whole number, counted from 0")
