from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from manyvoice.data.espeak import SEPARATOR, Engine, Library, Line, Program, open_engine
from manyvoice.data.voices import DIALECTS, VARIANTS
from manyvoice.errors import SynthesisError, UsageError

NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="the espeakng-loader engine needs os.fork")
NEEDS_PROGRAM = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="the program espeak-ng is not installed")
TEXTS = {"cmn": "打开厨房的灯", "yue": "打開廚房嘅燈"}
#: f3 and Alicia breathe (noise), f2 has an echo, klatt is another synthesiser: all carry state in one process
STATEFUL = ("f3", "Alicia", "f2", "klatt")


@pytest.fixture(
    scope="module", params=[pytest.param("program", marks=NEEDS_PROGRAM), pytest.param("library", marks=NEEDS_FORK)]
)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "library":
        pytest.importorskip("espeakng_loader", reason="the espeakng-loader wheel is not installed")
    opened = open_engine(request.param)
    yield opened
    opened.close()


def say(engine: Engine, voice: str, ssml: str = "turn it on") -> bytes:
    samples, hertz = engine.speak(Line(voice=voice, ssml=ssml, pitch=40, rate=160))
    assert hertz == 22_050 and samples.dtype == np.int16
    return samples.tobytes()


def test_an_utterance_does_not_depend_on_what_was_said_before(engine: Engine) -> None:
    voices = [f"gmw/en+{variant}" for variant in STATEFUL]
    first = {voice: say(engine, voice) for voice in voices}
    random.Random(0).shuffle(voices)
    assert {voice: say(engine, voice) for voice in voices} == first
    assert len(set(first.values())) == len(voices)


def test_another_process_in_another_second_says_the_same(engine: Engine) -> None:
    before = say(engine, "gmw/en+f3")
    time.sleep(1.05)  # the library's noise is seeded with the second it was started in, unless it is told otherwise
    fresh = open_engine(engine.kind)
    try:
        assert say(fresh, "gmw/en+f3") == before
    finally:
        fresh.close()


def test_a_voice_that_does_not_exist_is_an_error_and_not_the_voice_before(engine: Engine) -> None:
    say(engine, "gmw/en-US")
    with pytest.raises(SynthesisError, match="gmw/nowhere"):
        say(engine, "gmw/nowhere")


def test_a_variant_that_does_not_exist_is_refused(engine: Engine) -> None:
    engine.require("gmw/en")
    engine.require("gmw/en+f3")
    with pytest.raises(SynthesisError, match=r"'gmw/en\+nobody': espeak-ng .* has no variant 'nobody'; use another"):
        engine.require("gmw/en+nobody")


def test_every_dialect_and_variant_is_there_and_dialects_sound_different(engine: Engine) -> None:
    for variant in VARIANTS:
        engine.require(f"gmw/en+{variant}")
    heard = {dialect: say(engine, voice, TEXTS.get(dialect, "turn it on")) for dialect, voice in DIALECTS.items()}
    assert len(set(heard.values())) == len(DIALECTS)


def test_phonemes_are_separated_and_words_are_apart(engine: Engine) -> None:
    kitchen = engine.phonemes("gmw/en", "turn, kitchen").split()
    assert [word.split(SEPARATOR)[-1] for word in kitchen] == ["n", "n"]
    assert [len(word.split(SEPARATOR)) for word in kitchen] == [3, 5]


@pytest.mark.parametrize("dialect", sorted(TEXTS))
def test_chinese_characters_are_not_read_as_english(engine: Engine, dialect: str) -> None:
    phonemes = engine.phonemes(DIALECTS[dialect], TEXTS[dialect])
    assert "(en)" not in phonemes and len(phonemes.split()) == len(TEXTS[dialect])


@NEEDS_FORK
def test_with_neither_installed_both_ways_to_get_it_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "espeakng_loader.py").write_text("raise ImportError")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SynthesisError, match=r'pip install "manyvoice\[synth\]"` or `apt-get install espeak-ng`'):
        open_engine()
    with pytest.raises(SynthesisError, match="espeak-ng is not on PATH"):
        open_engine("program")


@NEEDS_FORK
def test_without_the_program_the_library_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("espeakng_loader", reason="the espeakng-loader wheel is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    opened = open_engine()
    assert isinstance(opened, Library) and opened.version[0].isdigit()
    opened.close()


@NEEDS_FORK
def test_a_process_that_has_ended_is_named() -> None:
    pytest.importorskip("espeakng_loader", reason="the espeakng-loader wheel is not installed")
    opened = Library()
    opened._process.kill()
    opened._process.wait()
    with pytest.raises(SynthesisError, match="process that holds the espeak-ng library"):
        say(opened, "gmw/en")
    opened.close()


def test_another_program_of_that_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "espeak-ng"
    path.write_text(f"#!{sys.executable}\nprint('hello')\n")
    path.chmod(0o755)
    with pytest.raises(SynthesisError, match="that is not espeak-ng"):
        Program(str(path))


def test_a_newer_program_is_told_to_be_deterministic(tmp_path: Path) -> None:
    path = tmp_path / "espeak-ng"
    answers = {
        "--version": "eSpeak NG text-to-speech: 1.52.0  Data at: /data",
        "--help": "-D\t  Enable deterministic mode",
    }
    path.write_text(f"#!{sys.executable}\nimport sys\nprint({answers!r}.get(sys.argv[1], sys.argv))\n")
    path.chmod(0o755)
    program = Program(str(path))
    assert (program.version, program.data) == ("1.52.0", Path("/data"))
    assert program._fixed == ["-D"]


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UsageError, match="engine = 'festival': unknown; use one of auto, program, library"):
        open_engine("festival")


def test_the_library_process_does_not_load_torch() -> None:
    code = "import sys, manyvoice.data.espeak; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
