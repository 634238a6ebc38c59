"""lhotse's cut manifests and Shar folders, read without lhotse.

Only plain cuts are read: one recording, whole or a span of it. What lhotse would have to compute first (mixtures,
padding, perturbation) is refused by name, and so are sources that would run a command or fetch an address.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, final

import numpy as np

from manyvoice.data import rows
from manyvoice.data.lines import LineFile
from manyvoice.data.sources import Headers, Source, file_row
from manyvoice.data.utterance import PartAudio, Utterance
from manyvoice.errors import CorpusError
from manyvoice.types import Seconds

_KINDS: Final = ("MonoCut", "MultiCut")
_FLATTEN: Final = "write the cuts as plain sound first with lhotse's CutSet.save_audios"


def is_cut(row: Mapping[str, object]) -> bool:
    """Whether a JSON row is a cut of lhotse, of any kind."""
    return str(row.get("type", "")).endswith("Cut") or ("recording" in row and "supervisions" in row)


def is_other_lhotse(row: Mapping[str, object]) -> bool:
    """Whether a JSON row is a recording or a supervision of lhotse, half of what a corpus needs."""
    return {"id", "sources", "sampling_rate"} <= set(row) or {"id", "recording_id", "start", "duration"} <= set(row)


@final
class CutSource(Source):
    """A cut manifest whose recordings are files; a relative path starts at the manifest, else where we run."""

    def __init__(self, lines: LineFile):
        self._lines = lines
        self._folder = str(lines.paths[0].parent)
        self._here = os.getcwd()
        self._headers = Headers(len(lines))

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, i: int) -> Utterance:
        where = self._lines.where(i)
        cut = rows.parse_json(self._lines.line(i), where)
        path = _source(cut, where, "file")
        folder = self._folder
        if not os.path.exists(os.path.join(folder, path)) and os.path.exists(os.path.join(self._here, path)):
            folder = self._here
        return file_row(rows.parse({**_flat(cut, where), "audio_filepath": path}, where), i, folder, self._headers)


@final
class SharSource(Source):
    """A Shar folder: cuts.NNNNNN.jsonl(.gz), and beside each a recording.NNNNNN.tar in the same order."""

    def __init__(self, folder: Path):
        self._cuts = LineFile(*shar_cuts(folder))
        self._counts = self._cuts.counts()
        self._first = np.concatenate([[0], np.cumsum(self._counts)])
        self._members: dict[int, list[tuple[str, int, int]]] = {}

    def __len__(self) -> int:
        return len(self._cuts)

    def row(self, i: int) -> Utterance:
        where = self._cuts.where(i)
        cut = rows.parse_json(self._cuts.line(i), where)
        _source(cut, where, "shar")
        fields = rows.parse(_flat(cut, where), where)
        if fields.duration is None or fields.id is None:
            raise CorpusError(f"{where}: a cut must have an id and a duration; export the Shar folder again")
        s = self._cuts.part(i)
        path = self._cuts.paths[s]
        tar = path.with_name("recording." + path.name.split(".")[1] + ".tar")
        members = self._listed(s, tar, where)
        if len(members) != self._counts[s]:
            held = f"{tar.name} holds {len(members)} sounds for {self._counts[s]} cuts"
            raise CorpusError(f"{where}: {held}; export the Shar folder again")
        name, at, size = members[i - int(self._first[s])]
        start = fields.offset or Seconds(0.0)
        return fields.utterance(
            PartAudio(tar, at, size, name, start, fields.duration, fields.channel), fields.duration, fields.id
        )

    def _listed(self, s: int, tar: Path, where: str) -> list[tuple[str, int, int]]:
        """Name, place and size of each sound of a shard, found on first use."""
        if s not in self._members:
            try:
                with tarfile.open(tar, "r:") as file:
                    found = [(m.name, m.offset_data, m.size) for m in file if not m.name.endswith((".json", ".nometa"))]
            except (OSError, tarfile.TarError, ValueError, OverflowError, EOFError) as error:
                raise CorpusError(f"{where}: {tar} cannot be read: {error}; export the Shar folder again") from error
            self._members[s] = found
        return self._members[s]


def shar_cuts(folder: Path) -> list[Path]:
    """The cut files of a Shar folder in order; empty if it is none."""
    return sorted([*folder.glob("cuts.*.jsonl"), *folder.glob("cuts.*.jsonl.gz")], key=lambda path: path.name)


def _flat(cut: Mapping[str, object], where: str) -> dict[str, object]:
    """A cut as one row with our column names; what is special to the data stays as further columns."""
    said = [_mapping(s, where, "supervisions") for s in _list(cut.get("supervisions", []), where, "supervisions")]
    said.sort(key=lambda s: _start(s.get("start", 0)))
    row: dict[str, object] = {}
    for mapping in (cut.get("custom"), *(s.get("custom") for s in said)):
        for name, value in _mapping(mapping or {}, where, "custom").items():
            row[name if name not in rows.COLUMNS else f"custom_{name}"] = value
    texts = [s.get("text") or "" for s in said]
    if not all(isinstance(text, str) for text in texts):
        raise rows.wrong(where, "supervisions.text", texts, "must be strings")
    row.update(id=cut.get("id"), offset=cut.get("start"), duration=cut.get("duration"), channel=_channel(cut, where))
    if row["offset"] == 0 and row["duration"] == _mapping(cut["recording"], where, "recording").get("duration"):
        row["offset"] = None  # the whole recording, so that a check compares it with the header
    row["text"] = " ".join(str(text) for text in texts).strip()
    for name in ("speaker", "language"):
        values = [s.get(name) for s in said if s.get(name) is not None]
        row[name] = values[0] if values and values.count(values[0]) == len(values) else None
    return row


def _start(value: object) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e9 else 0.0


def _source(cut: Mapping[str, object], where: str, wanted: str) -> str:
    """The path of the one recording, which must be of the type that is wanted."""
    kind = cut.get("type", "MonoCut")
    if kind not in _KINDS:
        raise CorpusError(f"{where}: type = {rows.shorten(kind)}: must be {' or '.join(_KINDS)}; {_FLATTEN}")
    if cut.get("recording") is None:
        raise CorpusError(f"{where}: the cut has no recording, only features perhaps; export it with its sound")
    recording = _mapping(cut["recording"], where, "recording")
    if recording.get("transforms"):
        shown = rows.shorten(recording["transforms"])
        raise CorpusError(f"{where}: recording.transforms = {shown}: would change the sound on the fly; {_FLATTEN}")
    sources = _list(recording.get("sources"), where, "recording.sources")
    source = _mapping(sources[0], where, "recording.sources") if len(sources) == 1 else {}
    path = source.get("source")
    if source.get("type") != wanted or not isinstance(path, str):
        shown = rows.shorten(sources)
        raise CorpusError(f"{where}: recording.sources = {shown}: must be one of type {wanted!r}; {_FLATTEN}")
    return path


def _channel(cut: Mapping[str, object], where: str) -> int | None:
    """The channel to take; None if the cut takes all that the recording has."""
    recording = _mapping(cut.get("recording"), where, "recording")
    all_of_it = _list(recording.get("channel_ids") or [0], where, "recording.channel_ids")
    taken = cut.get("channel", 0)
    taken = taken if isinstance(taken, list) else [taken]
    if sorted(map(str, taken)) == sorted(map(str, all_of_it)):
        return None
    if len(taken) == 1 and taken[0] in all_of_it:
        return all_of_it.index(taken[0])
    raise CorpusError(f"{where}: channel = {rows.shorten(taken)}: must be one of {all_of_it} or all; {_FLATTEN}")


def _mapping(value: object, where: str, column: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise rows.wrong(where, column, value, "must be an object")
    return value


def _list(value: object, where: str, column: str) -> list[object]:
    if not isinstance(value, list):
        raise rows.wrong(where, column, value, "must be a list")
    return value
