"""Sound files in and out: mono float32 at one rate, within limits that are checked while decoding.

Everything that decodes sound in manyvoice comes through `read_audio`, so its limits hold everywhere.

    N samples
"""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, final

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from manyvoice.errors import AudioError
from manyvoice.types import Seconds

Samples: TypeAlias = NDArray[np.float32]
Sound: TypeAlias = str | Path | bytes

DURATION_TOLERANCE: Final = Seconds(0.1)  # manifests round to a tenth of a second; less than one phone is lost
_BLOCK: Final = 65_536
_UNREADABLE: Final = (soundfile.SoundFileError, OSError, RuntimeError, ValueError, TypeError, AssertionError)
_SUBTYPES: Final = {".wav": "WAV", ".flac": "FLAC"}


@dataclass(frozen=True, kw_only=True)
class AudioLimits:
    """What one call may decode; a header can lie, so the decoder counts.

    The defaults admit an hour of 16 kHz speech on four channels and stop a forged header before it fills memory.

    Args: max_seconds: of sound decoded.  max_bytes: of decoded float32, all channels.  max_channels: in the file.
    """

    max_seconds: Seconds = Seconds(3600.0)
    max_bytes: int = 1 << 30
    max_channels: int = 16


class AudioInfo(NamedTuple):
    """What a header says."""

    duration: Seconds
    rate: int
    channels: int


DEFAULT_LIMITS: Final = AudioLimits()
START: Final = Seconds(0.0)


def audio_info(sound: Sound) -> AudioInfo:
    """Duration, sample rate and channels from the header; nothing is decoded.

    Raises: AudioError if there is no such file or its header cannot be read.
    """
    with _opened(sound) as file:
        return AudioInfo(Seconds(file.frames / file.samplerate), file.samplerate, file.channels)


def read_audio(
    sound: Sound,
    *,
    offset: Seconds = START,
    duration: Seconds | None = None,
    rate: int = 16_000,
    channel: int | None = None,
    limits: AudioLimits = DEFAULT_LIMITS,
) -> Samples:
    """Decode ``duration`` seconds from ``offset`` to mono float32 [N] at ``rate``.

    Reads every format of libsndfile (WAV, FLAC, MP3, Ogg Vorbis, Opus, ...) from a file or from bytes. Channels are
    averaged unless ``channel`` picks one. Resampled by soxr at its HQ setting, which is deterministic.

    Raises: AudioError if it cannot be opened or decoded, is empty, ends more than 0.1 s before the span that is asked
        for, holds samples that are not finite, or exceeds the limits.
    """
    if rate <= 0:
        raise ValueError(f"rate must be a positive number of samples per second, but is {rate}")
    name = sound_name(sound)
    if not (math.isfinite(offset) and offset >= 0):
        raise AudioError(f"{name}: offset = {offset!r}: must be zero or more seconds; correct the row")
    if duration is not None and not (math.isfinite(duration) and duration > 0):
        raise AudioError(f"{name}: duration = {duration!r}: must be a positive number of seconds; correct the row")
    with _opened(sound) as file:
        native = file.samplerate
        _check_channels(name, file.channels, channel, limits)
        try:
            x_NC = _decode(name, file, offset, duration, limits)
        except _UNREADABLE as error:
            raise AudioError(f"{name}: cannot be decoded: {error}; {_DAMAGED}") from error
    x_N = x_NC.mean(axis=1, dtype=np.float32) if channel is None else np.ascontiguousarray(x_NC[:, channel])
    if not np.isfinite(x_N).all():
        raise AudioError(f"{name}: holds samples that are not finite numbers; {_DAMAGED}")
    return resample(x_N, native, rate, name)


def write_audio(path: str | Path, samples_N: NDArray[np.float32], rate: int) -> None:
    """Write mono samples in [-1, 1] as 16-bit WAV or FLAC, whichever the name ends in; louder samples are clipped.

    Raises: AudioError if the name ends otherwise, the samples are not finite, or the file cannot be written.
    """
    path = Path(path)
    kind = _SUBTYPES.get(path.suffix.lower())
    if kind is None:
        raise AudioError(f"{path}: must end in .wav or .flac to be written; choose one of the two")
    try:
        soundfile.write(path, to_int16(samples_N), rate, format=kind, subtype="PCM_16")
    except _UNREADABLE as error:
        raise AudioError(f"{path}: cannot be written: {error}; check the folder and the space left") from error


def to_int16(samples_N: NDArray[np.float32]) -> NDArray[np.int16]:
    """Samples in [-1, 1] as 16-bit integers, rounded and clipped; what was read from 16 bits comes back exactly.

    Raises: AudioError if the samples are not one row of finite numbers.
    """
    if samples_N.ndim != 1 or not np.isfinite(samples_N).all():
        raise AudioError(f"samples must be one row of finite numbers, but have shape {samples_N.shape}; mix to mono")
    scaled = np.rint(samples_N.astype(np.float64) * 32_768.0)
    return np.clip(scaled, -32_768, 32_767).astype(np.int16)


def from_int16(samples_N: NDArray[np.int16]) -> Samples:
    """16-bit integers as float32 in [-1, 1)."""
    return samples_N.astype(np.float32) / np.float32(32_768.0)


def resample(x_N: Samples, native: int, rate: int, name: str = "samples") -> Samples:
    """float32 [N] at ``native`` Hz to ``rate`` Hz by soxr at its HQ setting. Raises: AudioError if nothing is left."""
    if native == rate:
        return x_N
    try:
        y_N = np.asarray(soxr.resample(x_N, native, rate, quality="HQ"), dtype=np.float32)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise AudioError(f"{name}: cannot be resampled from {native} Hz to {rate} Hz: {error}; {_DAMAGED}") from error
    if len(y_N) == 0:
        raise AudioError(f"{name}: too short to be resampled from {native} Hz to {rate} Hz; leave the row out")
    return y_N


def sound_name(sound: Sound) -> str:
    """How a message calls a sound: its path, or how many bytes it has."""
    return f"audio of {len(sound)} bytes" if isinstance(sound, bytes) else str(sound)


_DAMAGED: Final = "the file is damaged or no sound: replace it, or leave the row out"


@final
class _Forward(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """A file that is only read onwards.

    soundfile seeks to where it already is after every block, and libsndfile 1.2.2 gives silence after a seek in some
    MP3 files: read in blocks, they would fall silent after the first.
    """

    def seekable(self) -> bool:
        return False


@final
class _Memory:
    """Bytes as a file for libsndfile, which seeks to negative places in damaged ones: that moves nothing here."""

    def __init__(self, data: bytes):
        self._file = io.BytesIO(data)

    def seek(self, offset: int, whence: int) -> int:
        with contextlib.suppress(ValueError, OverflowError):
            self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def readinto(self, buffer: bytearray) -> int:
        return self._file.readinto(buffer)


def _opened(sound: Sound) -> soundfile.SoundFile:
    name = sound_name(sound)
    if not isinstance(sound, bytes):
        _check_file(name, Path(sound))
    try:
        file = _Forward(_Memory(sound) if isinstance(sound, bytes) else str(sound))
    except _UNREADABLE as error:
        reason = getattr(error, "error_string", str(error)).rstrip(".")
        raise AudioError(f"{name}: cannot be opened as sound: {reason}; {_DAMAGED}") from error
    if file.samplerate <= 0 or file.channels <= 0 or file.frames < 0:
        file.close()
        raise AudioError(f"{name}: its header says {file.channels} channels at {file.samplerate} Hz; {_DAMAGED}")
    return file


def _check_file(name: str, path: Path) -> None:
    if "\0" in name:
        raise AudioError(f"{name!r}: a path cannot hold a zero byte; correct the row")
    try:
        found = path.is_file()
    except (OSError, ValueError) as error:
        raise AudioError(f"{name!r}: cannot be reached: {error}; correct the path or the permissions") from error
    if not found:
        raise AudioError(f"{name}: no such file; correct the path (a relative one starts at the manifest's folder)")


def _check_channels(name: str, channels: int, channel: int | None, limits: AudioLimits) -> None:
    if channels > limits.max_channels:
        raise AudioError(f"{name}: has {channels} channels, {limits.max_channels} are allowed; mix it down first")
    if channel is not None and not 0 <= channel < channels:
        raise AudioError(f"{name}: channel = {channel}: the file has {channels}, counted from 0; correct the row")


def _decode(
    name: str, file: soundfile.SoundFile, offset: Seconds, duration: Seconds | None, limits: AudioLimits
) -> NDArray[np.float32]:
    """The span as N C at the file's own rate, block by block so that the limits stop a long one early."""
    rate, channels = file.samplerate, file.channels
    whole = Seconds(file.frames / rate)
    if offset >= whole and (offset > 0 or file.frames == 0):
        reason = "holds no sound" if file.frames == 0 else f"offset = {offset} s: the file is {whole:.3f} s long"
        raise AudioError(f"{name}: {reason}; correct the row or leave it out")
    start = round(offset * rate)
    asked = file.frames - start if duration is None else max(1, round(duration * rate))
    _advance(file, min(start, file.frames))
    blocks: list[NDArray[np.float32]] = []
    got = 0
    while got < asked:
        block = file.read(min(_BLOCK, asked - got), dtype="float32", always_2d=True)
        if len(block) == 0:
            break
        got += len(block)
        _check_amount(name, Seconds(got / rate), got * channels * 4, limits)
        blocks.append(block)
    if got == 0 or asked - got > DURATION_TOLERANCE * rate:
        raise AudioError(
            f"{name}: ends {(asked - got) / rate:.3f} s before {offset + asked / rate:.3f} s, where the row or the "
            "header says it does; correct the duration or replace the file"
        )
    return np.concatenate(blocks)


def _advance(file: soundfile.SoundFile, start: int) -> None:
    """Go to a sample; an MP3 is decoded up to it, see `_Forward`."""
    if start > 0 and file.format != "MP3":
        file.seek(start)
        return
    while start > 0 and (dropped := len(file.read(min(_BLOCK, start), dtype="float32", always_2d=True))):
        start -= dropped


def _check_amount(name: str, seconds: Seconds, size: int, limits: AudioLimits) -> None:
    if seconds > limits.max_seconds:
        raise AudioError(
            f"{name}: more than {limits.max_seconds:g} s of sound in one piece; cut it with offset and duration"
        )
    if size > limits.max_bytes:
        raise AudioError(f"{name}: decodes to more than {limits.max_bytes} bytes; cut it with offset and duration")
