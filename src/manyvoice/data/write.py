"""Writing a corpus as a NeMo manifest, and the sound that so far lay in memory or inside an archive."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from manyvoice.data.audio import write_audio
from manyvoice.data.utterance import FileAudio, Utterance
from manyvoice.errors import CorpusError


def write_manifest(
    utterances: Iterable[Utterance],
    path: str | Path,
    *,
    overwrite: bool = False,
    audio_folder: str | Path | None = None,
) -> None:
    """JSON lines with audio paths relative to the manifest; complete or not there at all.

    Args: audio_folder: where sound goes that is in no file of its own, as 16-bit FLAC at its own rate.
    Raises: CorpusError if the file exists, a row is malformed, a column has no JSON form, or sound needs a folder.
    """
    target = Path(path).absolute()
    if target.exists() and not overwrite:
        raise CorpusError(f"{path}: exists already; choose another name, or say that it may be overwritten")
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            for number, utterance in enumerate(utterances):
                file.write(_line(utterance, target.parent, _sound(utterance, number, audio_folder)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be written: {error}; check the folder and the space left") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _sound(utterance: Utterance, number: int, folder: str | Path | None) -> FileAudio:
    if isinstance(utterance.audio, FileAudio):
        return utterance.audio
    if folder is None:
        raise CorpusError(
            f"{utterance.where}: {utterance.audio.describe()} is in no file of its own; give an audio folder"
        )
    path = Path(folder).absolute() / f"{number:09d}.flac"
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = utterance.audio.info().rate
    write_audio(path, utterance.audio.read(rate), rate)
    return FileAudio(path)


def _line(utterance: Utterance, folder: Path, audio: FileAudio) -> str:
    row: dict[str, object] = {
        "id": utterance.id,
        "audio_filepath": os.path.relpath(audio.path.absolute(), folder),
        "duration": utterance.duration,
        "text": utterance.text,
        "offset": audio.offset,
        "channel": audio.channel,
        "speaker": utterance.speaker,
        "label": utterance.label,
        "language": utterance.language,
    }
    row = {name: value for name, value in row.items() if value is not None}
    try:
        line = json.dumps({**utterance.extra, **row}, ensure_ascii=False, default=_plain, allow_nan=True)
        line.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CorpusError(f"{utterance.where}: a column has no JSON form: {error}; leave that column out") from error
    return line + "\n"


def _plain(value: object) -> object:
    """numpy's numbers and arrays as Python's; the JSON encoder asks for whatever it does not know."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written")
