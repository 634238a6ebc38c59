"""Whatever stands in a manifest or a sound file, reading it gives rows or a CorpusError, never anything else."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from manyvoice.data.audio import AudioLimits, audio_info, read_audio
from manyvoice.data.check import check
from manyvoice.data.manifest import open_corpus
from manyvoice.errors import AudioError, CorpusError
from manyvoice.types import Seconds

pytestmark = pytest.mark.slow

LIMITS = AudioLimits(max_seconds=Seconds(60.0), max_bytes=1 << 26)
GOOD = {"audio_filepath": "a.wav", "duration": 0.1, "text": "x", "offset": 0.0, "speaker": "s", "channel": 0}
CUT = {
    "id": "c",
    "start": 0,
    "duration": 0.1,
    "channel": 0,
    "supervisions": [{"start": 0, "text": "x", "speaker": "s", "custom": {}}],
    "recording": {"sources": [{"type": "file", "source": "a.wav"}], "channel_ids": [0], "duration": 0.1},
    "type": "MonoCut",
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def read_all(path: Path) -> None:
    """Every way in which a corpus is read."""
    with contextlib.suppress(CorpusError):
        corpus = open_corpus(path)
        report = check(corpus, deep=True)
        kept = report.keep(corpus)
        assert len(kept) + len({p.index for p in report.errors()}) == len(corpus)
        kept.write(path.with_name("out.jsonl"), overwrite=True)
        assert kept.fingerprint == open_corpus(path.with_name("out.jsonl")).fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    soundfile.write(folder / "a.wav", np.full(1600, 0.1), 16_000)
    return folder


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.csv", "m.tsv", "m.jsonl.gz", "m.csv.gz"])
@given(data=st.binary(max_size=300), pack=st.booleans())
@settings(max_examples=300)
def test_random_bytes(folder: Path, name: str, data: bytes, pack: bool) -> None:
    (folder / name).write_bytes(gzip.compress(data) if pack and name.endswith(".gz") else data)
    read_all(folder / name)


def changed(row: dict[str, object], path: list[int], value: object) -> object:
    """The row with one value, at any depth, replaced."""
    if not path or not isinstance(row, dict | list) or not row:
        return value
    keys = list(row) if isinstance(row, dict) else list(range(len(row)))
    key = keys[path[0] % len(keys)]
    copy = row.copy()
    copy[key] = changed(copy[key], path[1:], value)  # type: ignore[arg-type]
    return copy


@pytest.mark.parametrize("row", [GOOD, CUT], ids=["nemo", "lhotse"])
@given(changes=st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=5), JSON), max_size=4))
@settings(max_examples=1000)
def test_mutated_rows(folder: Path, row: dict[str, object], changes: list[tuple[list[int], object]]) -> None:
    rows = [row, *(changed(row, path, value) for path, value in changes)]
    (folder / "r.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    read_all(folder / "r.jsonl")


@given(data=st.data())
@settings(max_examples=500)
def test_mutated_lines(folder: Path, data: st.DataObject) -> None:
    text = bytearray((json.dumps(GOOD) + "\n").encode() * 3)
    for _ in range(data.draw(st.integers(1, 6))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    (folder / "l.jsonl").write_bytes(bytes(text))
    read_all(folder / "l.jsonl")


@given(
    cells=st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), max_size=5), max_size=5),
    end=st.sampled_from("ct"),
)
@settings(max_examples=300)
def test_random_tables(folder: Path, cells: list[list[str]], end: str) -> None:
    header = ["path", "text", "duration", "offset", "channel"]
    gap = "," if end == "c" else "\t"
    (folder / f"t.{end}sv").write_bytes("\n".join(gap.join(line) for line in [header, *cells]).encode())
    read_all(folder / f"t.{end}sv")


def sound(form: str, subtype: str | None) -> bytes:
    buffer = io.BytesIO()
    x_NC = np.random.default_rng(0).uniform(-0.3, 0.3, (3000, 2))
    soundfile.write(buffer, x_NC, 16_000, format=form, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "form,subtype",
    [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"),
     ("MP3", None), ("AIFF", None), ("CAF", None), ("NIST", None), ("AU", None), ("W64", None)],
)  # fmt: skip
@given(data=st.data())
@settings(max_examples=300)
def test_mutated_sound(form: str, subtype: str | None, data: st.DataObject) -> None:
    encoded = bytearray(sound(form, subtype))
    for _ in range(data.draw(st.integers(0, 8))):
        near = data.draw(st.sampled_from([64, 256, len(encoded)]))
        encoded[data.draw(st.integers(0, min(near, len(encoded)) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(encoded)) | st.just(len(encoded)))
    offset, duration = data.draw(st.sampled_from([(0.0, None), (0.05, 0.1), (0.0, 0.1)]))
    with contextlib.suppress(AudioError):
        audio_info(bytes(encoded[:cut]))
    with contextlib.suppress(AudioError):
        length = None if duration is None else Seconds(duration)
        x_N = read_audio(bytes(encoded[:cut]), offset=Seconds(offset), duration=length, limits=LIMITS)
        assert x_N.dtype == np.float32 and x_N.ndim == 1 and len(x_N) > 0 and np.isfinite(x_N).all()


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_random_sound(data: bytes) -> None:
    with contextlib.suppress(AudioError):
        read_audio(data, limits=LIMITS)
