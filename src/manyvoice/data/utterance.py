"""One utterance of a corpus, and where its sound lies.

N samples
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, final

import numpy as np
from numpy.typing import NDArray

from manyvoice.data.audio import AudioInfo, Samples, audio_info, read_audio, resample
from manyvoice.errors import AudioError
from manyvoice.types import Seconds

T = TypeVar("T")


class Audio(ABC):
    """Sound that can be read; it holds where the samples are, rarely the samples."""

    @abstractmethod
    def read(self, rate: int = 16_000) -> Samples:
        """Mono float32 [N] at ``rate``. Raises: AudioError."""

    @abstractmethod
    def info(self) -> AudioInfo:
        """Duration of what `read` gives if nothing limits it, own rate and channels. Raises: AudioError."""

    @abstractmethod
    def describe(self) -> str:
        """Its name in a message."""


@final
@dataclass(frozen=True)
class FileAudio(Audio):
    """A file or a span of one.

    Args: offset: None is the whole file, so its header must agree with the row; a number marks a segment.
        duration: None is until the end.  channel: None is the mean of all.
    """

    path: Path
    offset: Seconds | None = None
    duration: Seconds | None = None
    channel: int | None = None

    def read(self, rate: int = 16_000) -> Samples:
        start = self.offset or Seconds(0.0)
        return read_audio(self.path, offset=start, duration=self.duration, rate=rate, channel=self.channel)

    def info(self) -> AudioInfo:
        info = audio_info(self.path)
        return info._replace(duration=Seconds(info.duration - (self.offset or 0.0)))

    def describe(self) -> str:
        return str(self.path) if self.offset is None else f"{self.path} from {self.offset:g} s"


@final
@dataclass(frozen=True)
class BytesAudio(Audio):
    """An encoded sound held in memory."""

    data: bytes = field(repr=False)
    name: str = "audio in memory"

    def read(self, rate: int = 16_000) -> Samples:
        return _named(self.name, lambda: read_audio(self.data, rate=rate))

    def info(self) -> AudioInfo:
        return _named(self.name, lambda: audio_info(self.data))

    def describe(self) -> str:
        return self.name


@final
@dataclass(frozen=True)
class PartAudio(Audio):
    """An encoded sound inside a larger file, such as a tar: ``size`` bytes from byte ``at``."""

    path: Path
    at: int
    size: int
    name: str
    offset: Seconds = Seconds(0.0)
    duration: Seconds | None = None
    channel: int | None = None

    def data(self) -> bytes:
        """The bytes of the encoded sound. Raises: AudioError."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.at)
                data = file.read(self.size)
        except OSError as error:
            raise AudioError(f"{self.describe()}: cannot be read: {error}; restore the file") from error
        if len(data) < self.size:
            raise AudioError(f"{self.describe()}: {self.path.name} ends early; it is cut off: copy it again")
        return data

    def read(self, rate: int = 16_000) -> Samples:
        data = self.data()
        return _named(
            self.describe(),
            lambda: read_audio(data, offset=self.offset, duration=self.duration, rate=rate, channel=self.channel),
        )

    def info(self) -> AudioInfo:
        data = self.data()
        info = _named(self.describe(), lambda: audio_info(data))
        return info._replace(duration=Seconds(info.duration - self.offset))

    def describe(self) -> str:
        return f"{self.path}:{self.name}"


@final
@dataclass(frozen=True, eq=False)
class ArrayAudio(Audio):
    """Samples held in memory, mono [N] in [-1, 1]."""

    samples_N: NDArray[np.float32] = field(repr=False)
    rate: int
    name: str = "samples in memory"

    def __post_init__(self) -> None:
        if self.samples_N.ndim != 1 or len(self.samples_N) == 0 or self.rate <= 0:
            shape = self.samples_N.shape
            raise AudioError(f"{self.name}: shape {shape} at {self.rate} Hz: must be one row of samples; mix to mono")

    def read(self, rate: int = 16_000) -> Samples:
        return resample(np.asarray(self.samples_N, dtype=np.float32), self.rate, rate, self.name)

    def info(self) -> AudioInfo:
        return AudioInfo(Seconds(len(self.samples_N) / self.rate), self.rate, 1)

    def describe(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One row of a corpus.

    Args:
        id: unique in a good corpus; made from the audio path where the manifest has none.
        duration: of the sound, positive.
        text: what is said; may be empty where ``label`` is the target.
        speaker, label, language: None where the manifest does not say.
        extra: the columns that have no field here.
        where: manifest and line, for messages.
    """

    id: str
    audio: Audio
    duration: Seconds
    text: str
    speaker: str | None = None
    label: str | None = None
    language: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    where: str = "memory"


def _named(name: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except AudioError as error:
        raise AudioError(f"{name}: {error}") from error
