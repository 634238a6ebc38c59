"""Readers of manifests, one class per format: how many rows there are, and any one of them on demand.

lhotse's formats are in `cuts`, Hugging Face datasets in `hub`.

    N rows
"""

from __future__ import annotations

import csv
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

import numpy as np

from manyvoice.data import rows
from manyvoice.data.lines import LineFile
from manyvoice.data.utterance import Audio, Utterance
from manyvoice.errors import AudioError, CorpusError
from manyvoice.types import Seconds


class Source(ABC):
    """The rows of one manifest; safe to fork and to pickle."""

    @abstractmethod
    def __len__(self) -> int:
        """How many rows, good or not."""

    @abstractmethod
    def row(self, i: int) -> Utterance:
        """The i-th row. Raises: CorpusError if the row is malformed; the rows around it can still be read."""


@final
class Headers:
    """Durations that no manifest states, read from the sound's header once and remembered."""

    def __init__(self, count: int):
        self._seconds_N = np.full(count, np.nan)

    def duration(self, i: int, audio: Audio) -> Seconds:
        """Seconds of the i-th sound. Raises: AudioError."""
        if np.isnan(self._seconds_N[i]):
            seconds = audio.info().duration
            if seconds <= 0:
                raise AudioError(f"{audio.describe()}: nothing is left of the file there; correct the offset")
            self._seconds_N[i] = seconds
        return Seconds(float(self._seconds_N[i]))


@final
class MemorySource(Source):
    """Utterances made by a program."""

    def __init__(self, utterances: Sequence[Utterance]):
        self._utterances = tuple(utterances)

    def __len__(self) -> int:
        return len(self._utterances)

    def row(self, i: int) -> Utterance:
        return self._utterances[i]


@final
class NemoSource(Source):
    """NeMo's manifest: JSON lines with audio_filepath (relative to the manifest), duration, text, optional offset."""

    def __init__(self, lines: LineFile):
        self._lines = lines
        self._folder = str(lines.paths[0].parent)
        self._headers = Headers(len(lines))

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, i: int) -> Utterance:
        where = self._lines.where(i)
        return file_row(rows.parse(rows.parse_json(self._lines.line(i), where), where), i, self._folder, self._headers)


@final
class TableSource(Source):
    """CSV (RFC 4180) or TSV (no quoting, as Common Voice writes it) with a header line of column names."""

    def __init__(self, lines: LineFile, *, tab: bool):
        self._lines = lines
        self._tab = tab
        self._headers = Headers(max(0, len(lines) - 1))
        if len(lines) == 0:
            raise CorpusError(f"{lines.paths[0]}: is empty; its first line must name the columns")
        self._names = [name.strip().lower() for name in self._cells(0)]
        wanted = ("audio_filepath", *rows.COLUMNS["audio_filepath"])
        if not set(wanted) & set(self._names) or len(set(self._names)) < len(self._names):
            raise CorpusError(
                f"{lines.where(0)}: columns = {rows.shorten(self._names)}: must be different names, one of them of "
                f"{', '.join(wanted)}; add a header line"
            )
        self._folder = self._audio_folder()

    def __len__(self) -> int:
        return len(self._lines) - 1

    def row(self, i: int) -> Utterance:
        where = self._lines.where(i + 1)
        return file_row(rows.parse(self._mapping(i), where), i, self._folder, self._headers)

    def _mapping(self, i: int) -> dict[str, object]:
        cells = self._cells(i + 1)
        if len(cells) != len(self._names):
            raise CorpusError(
                f"{self._lines.where(i + 1)}: has {len(cells)} columns, the header has {len(self._names)}; "
                "quote a text that holds the separator, and close every quote"
            )
        row: dict[str, object] = {name: cell for name, cell in zip(self._names, cells, strict=True) if cell != ""}
        for name in ("duration", "offset"):
            row[name] = _number(row.get(name))
        if str(row.get("channel", "")).isdecimal():
            row["channel"] = int(str(row["channel"])[:9])
        if not set(row) & {"text", *rows.COLUMNS["text"]} and set(self._names) & {"text", *rows.COLUMNS["text"]}:
            row["text"] = ""
        return row

    def _cells(self, i: int) -> list[str]:
        where = self._lines.where(i)
        try:
            line = self._lines.line(i).removeprefix(b"\xef\xbb\xbf").decode()
            if self._tab:
                return line.split("\t")
            return next(csv.reader([line], strict=True))
        except UnicodeError as error:
            raise CorpusError(f"{where}: is not UTF-8 text: {error}; save the table as UTF-8") from error
        except (csv.Error, StopIteration) as error:
            raise CorpusError(f"{where}: is not a row of CSV: {error}; close every quote") from error

    def _audio_folder(self) -> str:
        """The manifest's folder, or ``clips`` in it where Common Voice puts them."""
        folder = self._lines.paths[0].parent
        clips = folder / "clips"
        if len(self) and clips.is_dir():
            name = next((str(v) for k, v in self._mapping(0).items() if k in ("path", "audio_filepath")), "")
            if name and not (folder / name).exists() and (clips / name).exists():
                return str(clips)
        return str(folder)


@final
class FolderSource(Source):
    """Sound files under a folder: texts in ``a.txt`` beside ``a.wav``, or in LibriSpeech's ``*.trans.txt``."""

    def __init__(self, folder: Path):
        self._folder = folder.absolute()
        self._shown = str(folder)
        self._texts: dict[str, tuple[str, str]] = {}
        for transcript in sorted(self._folder.rglob("*.trans.txt")):
            self._add_transcript(transcript)
        sounds = [p.relative_to(self._folder) for p in self._folder.rglob("*") if p.suffix.lower() in rows.SOUNDS]
        stems = {str(path.with_suffix("")) for path in sounds}
        silent = [Path(stem + ".flac") for stem in self._texts if stem not in stems]
        self._paths = [str(path) for path in sorted(sounds + silent)]
        self._headers = Headers(len(self._paths))

    def __len__(self) -> int:
        return len(self._paths)

    def row(self, i: int) -> Utterance:
        path = Path(self._paths[i])
        stem = str(path.with_suffix(""))
        if stem in self._texts:
            where, text = self._texts[stem]
            found = re.fullmatch(r"(\d+)-\d+-\d+", path.stem)
            row = {"path": str(path), "text": text, "speaker": found[1] if found else None, "id": path.stem}
        else:
            where = f"{self._shown}/{path}"
            row = {"path": str(path), "text": self._beside(path, where)}
        return file_row(rows.parse(row, where), i, str(self._folder), self._headers)

    def _add_transcript(self, transcript: Path) -> None:
        place = transcript.parent.relative_to(self._folder)
        for number, line in enumerate(_read_text(transcript, str(transcript)).splitlines(), start=1):
            name, _, text = line.strip().partition(" ")
            if name:
                where = f"{self._shown}/{transcript.relative_to(self._folder)}:{number}"
                self._texts[str(place / name)] = (where, text.strip())

    def _beside(self, path: Path, where: str) -> str:
        text = (self._folder / path).with_suffix(".txt")
        if not text.is_file():
            raise CorpusError(f"{where}: no text: {text.name} must stand beside it; write it, or move the sound away")
        return " ".join(_read_text(text, f"{self._shown}/{path.with_suffix('.txt')}").split())


def file_row(fields: rows.Fields, i: int, folder: str, headers: Headers) -> Utterance:
    """The utterance of a row that names a sound file. Raises: CorpusError."""
    audio = fields.file(folder)
    name = rows.id_of(str(fields.path), fields.offset, folder)
    try:
        return fields.utterance(audio, fields.duration or headers.duration(i, audio), name)
    except AudioError as error:
        raise AudioError(f"{fields.where}: duration is missing and the file cannot give it: {error}") from error


def _number(cell: object) -> object:
    try:
        return float(str(cell)) if cell is not None else None
    except ValueError:
        return cell


_LARGEST_TEXT: Final = 256 << 20


def _read_text(path: Path, where: str) -> str:
    try:
        if path.stat().st_size > _LARGEST_TEXT:
            raise CorpusError(f"{where}: more than {_LARGEST_TEXT >> 20} MiB of text; split it")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise CorpusError(f"{where}: cannot be read as UTF-8 text: {error}; correct the file") from error
