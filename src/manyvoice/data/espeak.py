"""espeak-ng run as a program, or its library in a process of its own.

Both are driven one utterance at a time from a fresh state, because espeak-ng carries state from one utterance to the
next (echo, flutter and noise generators): in one process, most voice variants sound different the second time, even
after ``espeak_Terminate`` and ``espeak_Initialize``. The program is fresh by nature. The library is initialised once
in a process of its own (``python -m manyvoice.data.espeak``), which forks for every utterance; the child seeds the
noise generator, whose default seed is the clock.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from manyvoice.errors import SynthesisError, UsageError

ENGINES = ("auto", "program", "library")
#: Stands between the phonemes of a word; no phoneme of any espeak-ng language contains it.
SEPARATOR = "·"
_FRAME = struct.Struct(">BI")
_UTF8, _SSML, _PHONEMES = 0x01, 0x10, 0x100  # espeakCHARS_UTF8, espeakSSML, espeakPHONEMES of speak_lib.h
_RATE, _PITCH = 1, 3  # espeakRATE, espeakPITCH
_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000  # AUDIO_OUTPUT_SYNCHRONOUS (no threads: safe to fork), espeakINITIALIZE_DONT_EXIT
_SECONDS_PER_UTTERANCE = 120
_WAYS = 'install it with `pip install "manyvoice[synth]"` or `apt-get install espeak-ng`'


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is said, and how.

    Args: voice: espeak-ng's file name of the language, with its variant, ``gmw/en+f3``.  ssml: SSML, in which
        ``[[...]]`` holds phonemes.  pitch: 0 to 99, 50 is the voice's own.  rate: words a minute, at least 80.
    """

    voice: str
    ssml: str
    pitch: int = 50
    rate: int = 175


class Engine(ABC):
    """One way to run espeak-ng: equal lines give equal samples, in any order and in any process."""

    kind: str
    version: str
    data: Path

    @abstractmethod
    def speak(self, line: Line) -> tuple[NDArray[np.int16], int]:
        """Samples and their rate in hertz, without a pause at the end. Raises: SynthesisError."""

    @abstractmethod
    def phonemes(self, voice: str, text: str) -> str:
        """Phonemes with ``SEPARATOR`` between them, words apart by spaces. Raises: SynthesisError."""

    @abstractmethod
    def close(self) -> None:
        """Release what the engine holds."""

    def require(self, voice: str) -> None:
        """Raises: SynthesisError if the voice's variant is not installed: espeak-ng would silently leave it out."""
        _, _, variant = voice.partition("+")
        if variant and not (self.data / "voices" / "!v" / variant).is_file():
            raise SynthesisError(
                f"voice {voice!r}: espeak-ng {self.version} ({self.kind}) has no variant {variant!r}; use another one"
            )


def open_engine(kind: str = "auto") -> Engine:
    """The program where there is one, otherwise the library; or the one that is named.

    Raises: UsageError for an unknown kind; SynthesisError if espeak-ng is not installed.
    """
    if kind not in ENGINES:
        raise UsageError(f"engine = {kind!r}: unknown; use one of {', '.join(ENGINES)}")
    path = shutil.which("espeak-ng")
    if kind in ("auto", "program") and path is not None:
        return Program(path)
    if kind == "program":
        raise SynthesisError("espeak-ng is not on PATH; `apt-get install espeak-ng`, or use engine 'library'")
    return Library()


@final
class Program(Engine):
    """The command line, one process an utterance."""

    kind = "program"

    def __init__(self, path: str):
        self._path = path
        shown = self._run(["--version"]).decode(errors="replace")
        found = re.search(r"text-to-speech:\s*(\S+).*?Data at:\s*(.+)", shown)
        if found is None:
            raise SynthesisError(f"{path} --version says {shown.strip()!r}: that is not espeak-ng; {_WAYS}")
        self.version, self.data = found[1], Path(found[2].strip())
        # From 1.52 on the program seeds its noise with the clock unless it is told to be deterministic.
        usage = self._run(["--help"]).decode(errors="replace")
        self._fixed = ["-D"] if re.search(r"^-D\b", usage, re.MULTILINE) else []

    def speak(self, line: Line) -> tuple[NDArray[np.int16], int]:
        how = ["-v", line.voice, "-p", str(line.pitch), "-s", str(line.rate)]
        wave = self._run([*self._fixed, *how, "-m", "-z", "-b", "1", "--stdin", "--stdout"], line.ssml)
        return _samples(wave, line)

    def phonemes(self, voice: str, text: str) -> str:
        said = self._run(["-v", voice, "-x", "-q", f"--sep={SEPARATOR}", "-b", "1", "--stdin"], text)
        return " ".join(said.decode("utf-8").split())

    def close(self) -> None:
        """Nothing is held between utterances."""

    def _run(self, arguments: list[str], text: str = "") -> bytes:
        command = [self._path, *arguments]
        try:
            done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=_SECONDS_PER_UTTERANCE)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SynthesisError(f"{' '.join(command)} on {text!r}: {error}") from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip()
            raise SynthesisError(f"{' '.join(command)} on {text!r} ended with status {done.returncode}: {said}")
        return done.stdout


def _samples(wave: bytes, line: Line) -> tuple[NDArray[np.int16], int]:
    # Written to a pipe, the lengths in the header are placeholders: the samples are all that follows "data" + length.
    start = wave.find(b"data")
    if not wave.startswith(b"RIFF") or start < 0:
        raise SynthesisError(f"espeak-ng said nothing for {line.ssml!r} with voice {line.voice!r}; check the voice")
    return np.frombuffer(wave[start + 8 :], dtype="<i2").astype(np.int16), int.from_bytes(wave[24:28], "little")


@final
class Library(Engine):
    """The shared library of the ``espeakng-loader`` wheel, in a process that forks for every utterance."""

    kind = "library"

    def __init__(self) -> None:
        if not hasattr(os, "fork"):
            raise SynthesisError("the espeakng-loader wheel needs os.fork, which is missing here; install the program")
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "manyvoice.data.espeak"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            hello = json.loads(self._answer())
        except SynthesisError:
            self.close()
            raise
        self.version, self.data, self._hertz = hello["version"], Path(hello["data"]), int(hello["hertz"])

    def speak(self, line: Line) -> tuple[NDArray[np.int16], int]:
        heard = np.frombuffer(self._ask({"op": "speak", **asdict(line)}), dtype="<i2").astype(np.int16)
        if not len(heard):
            raise SynthesisError(f"espeak-ng said nothing for {line.ssml!r} with voice {line.voice!r}")
        return heard, self._hertz

    def phonemes(self, voice: str, text: str) -> str:
        return self._ask({"op": "phonemes", "voice": voice, "text": text}).decode("utf-8")

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # a request that a dead process will not read
                    stream.close()
        self._process.wait(timeout=_SECONDS_PER_UTTERANCE)

    def _ask(self, request: dict[str, Any]) -> bytes:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise SynthesisError(f"the process that holds the espeak-ng library has ended: {error}") from error
        return self._answer()

    def _answer(self) -> bytes:
        assert self._process.stdout is not None
        head = self._process.stdout.read(_FRAME.size)
        if len(head) < _FRAME.size:
            raise SynthesisError("the process that holds the espeak-ng library ended without an answer; " + _WAYS)
        status, length = _FRAME.unpack(head)
        body = self._process.stdout.read(length)
        if status:
            raise SynthesisError(body.decode(errors="replace"))
        return body


class _Host:
    """The library's side: answers requests on standard input, one JSON object a line, each in a forked child."""

    def __init__(self, out: int):
        self._out = out
        try:
            import espeakng_loader
        except ImportError:
            raise SynthesisError(f"espeak-ng is not installed: no program on PATH and no library; {_WAYS}") from None
        self._data = str(espeakng_loader.get_data_path())
        try:
            self._lib = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        except OSError as error:
            raise SynthesisError(f"the espeakng-loader wheel is damaged: {error}; {_WAYS}") from error
        self._lib.espeak_Info.restype = ctypes.c_char_p
        self._lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self._hertz = self._lib.espeak_Initialize(_SYNCHRONOUS, 0, self._data.encode(), _DONT_EXIT)
        if self._hertz <= 0:
            raise SynthesisError(f"espeak_Initialize({self._data!r}) returned {self._hertz}; reinstall espeakng-loader")

    def hello(self) -> bytes:
        version = self._lib.espeak_Info(None).decode().split()[0]
        return json.dumps({"version": version, "data": self._data, "hertz": self._hertz}).encode()

    def serve(self) -> None:
        for request in sys.stdin.buffer:
            child = os.fork()
            if child == 0:
                self._child(json.loads(request))
            _, status = os.waitpid(child, 0)
            if status:
                send(self._out, 1, f"espeak-ng's library crashed (status {status}) on {request.decode()}".encode())

    def _child(self, request: dict[str, Any]) -> None:
        status = 1
        try:
            answer = self._speak(request) if request["op"] == "speak" else self._phonemes(request)
            status = 0
        except Exception as error:
            answer = str(error).encode()
        send(self._out, status, answer)
        os._exit(0)

    def _voice(self, name: str) -> None:
        # A name that is not a file ("en-gb") is refused with a status only, and the voice before it stays.
        code = self._lib.espeak_SetVoiceByName(name.encode())
        if code != 0:
            raise SynthesisError(f"voice {name!r}: espeak_SetVoiceByName returned {code}; name a file, as 'gmw/en'")

    def _speak(self, request: dict[str, Any]) -> bytes:
        heard: list[bytes] = []

        def hear(wave: Any, count: int, events: Any) -> int:
            if wave and count > 0:
                heard.append(ctypes.string_at(wave, 2 * count))
            return 0

        if hasattr(self._lib, "espeak_ng_SetRandSeed"):
            self._lib.espeak_ng_SetRandSeed(ctypes.c_long(1))
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)(hear)
        self._lib.espeak_SetSynthCallback(callback)
        self._voice(request["voice"])
        for parameter, name in ((_RATE, "rate"), (_PITCH, "pitch")):
            if self._lib.espeak_SetParameter(parameter, int(request[name]), 0) != 0:
                raise SynthesisError(f"{name} = {request[name]}: refused by espeak-ng")
        text = request["ssml"].encode() + b"\0"
        flags = _UTF8 | _SSML | _PHONEMES
        code = self._lib.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 1, 0, flags, None, None)
        if code != 0:
            raise SynthesisError(f"espeak_Synth returned {code} on {request['ssml']!r}")
        self._lib.espeak_Synchronize()
        return b"".join(heard)

    def _phonemes(self, request: dict[str, Any]) -> bytes:
        self._voice(request["voice"])
        text = ctypes.create_string_buffer(request["text"].encode())
        place = ctypes.c_void_p(ctypes.addressof(text))
        clauses: list[bytes] = []
        while place.value:
            clauses.append(self._lib.espeak_TextToPhonemes(ctypes.byref(place), _UTF8, ord(SEPARATOR) << 8))
        return b" ".join(b" ".join(clauses).split())


def send(out: int, status: int, body: bytes) -> None:
    """Write one answer: status, length, body."""
    left = memoryview(_FRAME.pack(status, len(body)) + body)
    while left:
        left = left[os.write(out, left) :]


def main() -> None:
    """Hold the library and answer until standard input ends."""
    out = os.dup(1)
    os.dup2(2, 1)  # the library prints to standard output now and then; that must not get between the answers
    try:
        host = _Host(out)
    except SynthesisError as error:
        send(out, 1, str(error).encode())
        return
    send(out, 0, host.hello())
    host.serve()


if __name__ == "__main__":
    main()
