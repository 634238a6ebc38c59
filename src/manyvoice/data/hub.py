"""Hugging Face datasets as a corpus: from the hub by name, or a folder that ``save_to_disk`` wrote.

Sound is taken encoded, as stored, and decoded here like any other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from manyvoice.data import rows
from manyvoice.data.audio import AudioInfo, Samples
from manyvoice.data.sources import Headers, Source
from manyvoice.data.utterance import ArrayAudio, Audio, BytesAudio, FileAudio, Utterance
from manyvoice.errors import AudioError, CorpusError

_SPLITS: Final = re.compile(r"(train|validation|valid|dev|test|all)\b.*")
_SOUND_COLUMNS: Final = ("audio", "audio_filepath", "file", "path")


@final
@dataclass(frozen=True, eq=False)
class HubAudio(Audio):
    """The sound of one row of a dataset, fetched when it is read."""

    table: Any = field(repr=False)
    column: str
    i: int
    name: str

    def read(self, rate: int = 16_000) -> Samples:
        return self._sound().read(rate)

    def info(self) -> AudioInfo:
        return self._sound().info()

    def describe(self) -> str:
        return self.name

    def _sound(self) -> Audio:
        value = self.table[self.i][self.column]
        if isinstance(value, str):
            return FileAudio(Path(value))
        if isinstance(value, Mapping):
            if value.get("bytes"):
                return BytesAudio(value["bytes"], self.name)
            if value.get("array") is not None:
                return ArrayAudio(np.asarray(value["array"], np.float32), int(value["sampling_rate"]), self.name)
            if value.get("path"):
                return FileAudio(Path(value["path"]))
        raise AudioError(f"{self.name}: column {self.column!r} holds no sound; load a dataset whose rows have audio")


@final
class HubSource(Source):
    """The rows of one split. Raises: CorpusError if it has no column with sound."""

    def __init__(self, table: Any, shown: str):
        import datasets

        columns = dict(table.features)
        sound = next((c for c, kind in columns.items() if isinstance(kind, datasets.Audio)), None)
        sound = sound or next((c for c in _SOUND_COLUMNS if c in columns), None)
        if sound is None:
            raise CorpusError(f"{shown}: columns = {sorted(columns)}: none holds sound; rename it to 'audio'")
        if isinstance(columns[sound], datasets.Audio):
            table = table.cast_column(sound, datasets.Audio(decode=False))
        self._sounds = table.select_columns([sound])
        self._words = table.remove_columns([sound])
        self._names = {c: k.names for c, k in columns.items() if isinstance(k, datasets.ClassLabel)}
        self._column = sound
        self._shown = shown
        self._headers = Headers(len(table))

    def __len__(self) -> int:
        return len(self._sounds)

    def row(self, i: int) -> Utterance:
        where = f"{self._shown}:{i + 1}"
        row = dict(self._words[i]) if self._words.column_names else {}
        for column, names in self._names.items():
            if isinstance(row.get(column), int) and 0 <= row[column] < len(names):
                row[column] = names[row[column]]
        fields = rows.parse(row, where)
        audio = HubAudio(self._sounds, self._column, i, where)
        duration = fields.duration or self._headers.duration(i, audio)
        return fields.utterance(audio, duration, rows.id_of(fields.path, None) if fields.path else f"{i:09d}")


def open_hub(spec: str) -> HubSource:
    """``NAME[:config][:split]``, where NAME may be a folder; ``NAME::split`` and ``NAME:train`` leave the config out.

    Raises: CorpusError if the extra is not installed, the dataset cannot be loaded, or it has splits and none is named.
    """
    datasets = _datasets()
    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    if not split and _SPLITS.fullmatch(config):
        config, split = "", config
    try:
        if Path(name).is_dir() and is_saved(Path(name)):
            table = datasets.load_from_disk(name)
            table = table[split] if split and isinstance(table, dict) else table
        else:
            table = datasets.load_dataset(name, config or None, split=split or None)
    except Exception as error:  # the library raises whatever its many parts do
        reason = " ".join(str(error).split())
        raise CorpusError(f"hf:{spec}: cannot be loaded: {reason}; check the name, the config and the split") from error
    if isinstance(table, dict):
        splits = sorted(table)
        raise CorpusError(f"hf:{spec}: has the splits {splits}; name one: hf:{name}:{config}:{splits[0]}")
    return HubSource(table, f"hf:{spec}")


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _datasets() -> Any:
    try:
        import datasets
    except (ImportError, OSError) as error:
        raise CorpusError("reading Hugging Face datasets needs the extra: pip install 'manyvoice[hf]'") from error
    return datasets
