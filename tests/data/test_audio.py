"""Sound in and out of files: values, spans, channels, rates, limits and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.data.audio import AudioLimits, audio_info, from_int16, read_audio, resample, to_int16, write_audio
from manyvoice.errors import AudioError, CorpusError
from manyvoice.types import Seconds

Wav = Callable[..., Path]


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


def test_info_tells_duration_rate_and_channels(wav: Wav) -> None:
    assert audio_info(wav(seconds=0.25, rate=8000, channels=2)) == (0.25, 8000, 2)
    assert audio_info(wav(seconds=0.25).read_bytes()) == (0.25, 16_000, 1)


def test_samples_come_back_as_written(tmp_path: Path) -> None:
    x_N = np.rint(noise(1000) * 32_768) / 32_768
    for name in ("a.wav", "b.flac"):
        write_audio(tmp_path / name, x_N.astype(np.float32), 16_000)
        y_N = read_audio(tmp_path / name)
        assert y_N.dtype == np.float32 and np.array_equal(x_N, y_N)


@given(st.lists(st.integers(-32_768, 32_767), min_size=1, max_size=50))
def test_sixteen_bits_survive_the_way_through_floats(values: list[int]) -> None:
    x_N = np.asarray(values, dtype=np.int16)
    assert np.array_equal(to_int16(from_int16(x_N)), x_N)


def test_loud_samples_are_clipped() -> None:
    assert to_int16(np.asarray([1.5, -1.5, 1.0], np.float32)).tolist() == [32_767, -32_768, 32_767]


def test_channels_are_averaged_or_one_is_picked(tmp_path: Path) -> None:
    x_NC = np.stack([noise(800, 1), noise(800, 2)], axis=1)
    soundfile.write(tmp_path / "s.wav", x_NC, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "s.wav"), x_NC.mean(axis=1), atol=1e-7)
    assert np.array_equal(read_audio(tmp_path / "s.wav", channel=1), x_NC[:, 1])
    with pytest.raises(AudioError, match=r"s\.wav: channel = 2: the file has 2, counted from 0; correct the row"):
        read_audio(tmp_path / "s.wav", channel=2)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "opus", "mp3"])
def test_a_span_is_a_slice_of_the_whole(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    form, subtype = {"opus": ("OGG", "OPUS"), "ogg": ("OGG", "VORBIS")}.get(kind, (kind.upper(), None))
    time_N = np.arange(32_000) / 16_000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 300 * time_N), 16_000, format=form, subtype=subtype)
    whole_N = read_audio(path)
    span_N = read_audio(path, offset=Seconds(0.5), duration=Seconds(0.25))
    assert len(span_N) == 4000
    np.testing.assert_allclose(span_N, whole_N[8000:12_000], atol=0.02)


def test_a_long_mp3_does_not_fall_silent_after_the_first_block(tmp_path: Path) -> None:
    time_N = np.arange(160_000) / 16_000
    soundfile.write(tmp_path / "a.mp3", 0.3 * np.sin(2 * np.pi * 300 * time_N), 16_000, format="MP3")
    x_N = read_audio(tmp_path / "a.mp3")
    loud_N = np.abs(x_N[: len(x_N) // 1600 * 1600]).reshape(-1, 1600).max(axis=1)
    assert len(x_N) == 160_000 and loud_N.min() > 0.25


@given(st.integers(1, 3000), st.sampled_from([8000, 11_025, 22_050, 44_100, 48_000]))
def test_resampling_keeps_the_duration(samples: int, rate: int) -> None:
    x_N = noise(samples)
    expected = samples * 16_000 / rate
    if expected < 0.5:
        return
    y_N = resample(x_N, rate, 16_000)
    assert abs(len(y_N) - expected) <= 1
    assert np.array_equal(y_N, resample(x_N, rate, 16_000))


def test_a_tone_keeps_its_pitch_at_another_rate(wav: Wav) -> None:
    x_N = read_audio(wav(seconds=1.0, rate=8000, hz=440.0))
    assert len(x_N) == 16_000
    assert np.abs(np.fft.rfft(x_N)).argmax() == 440


def test_limits_hold_while_decoding(wav: Wav) -> None:
    path = wav(seconds=0.5, channels=2)
    with pytest.raises(AudioError, match=r"more than 0\.2 s of sound in one piece; cut it with offset and duration"):
        read_audio(path, limits=AudioLimits(max_seconds=Seconds(0.2)))
    with pytest.raises(AudioError, match=r"decodes to more than 1000 bytes"):
        read_audio(path, limits=AudioLimits(max_bytes=1000))
    with pytest.raises(AudioError, match=r"has 2 channels, 1 are allowed; mix it down first"):
        read_audio(path, limits=AudioLimits(max_channels=1))
    assert len(read_audio(path, duration=Seconds(0.1), limits=AudioLimits(max_seconds=Seconds(0.2)))) == 1600


def test_a_long_file_is_stopped_before_it_is_decoded_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "long.flac", np.zeros(16_000 * 60, np.int16), 16_000)
    got: list[int] = []
    read = soundfile.SoundFile.read

    def counted(self: soundfile.SoundFile, frames: int, **settings: object) -> np.ndarray:
        got.append(frames)
        return read(self, frames, **settings)

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    with pytest.raises(AudioError, match="more than 5 s"):
        read_audio(tmp_path / "long.flac", limits=AudioLimits(max_seconds=Seconds(5.0)))
    assert sum(got) <= 16_000 * 10


def test_a_forged_sample_rate_cannot_multiply_the_samples(wav: Wav) -> None:
    header = bytearray(wav(seconds=1.0).read_bytes())
    header[24:28] = (1).to_bytes(4, "little")
    with pytest.raises(AudioError, match=r"more than 3600 s of sound"):
        read_audio(bytes(header))


def test_a_span_beyond_the_end_is_refused_and_a_rounded_one_is_not(wav: Wav) -> None:
    path = wav(seconds=1.0)
    with pytest.raises(AudioError, match=r"ends 0\.500 s before 1\.500 s, where the row"):
        read_audio(path, offset=Seconds(0.5), duration=Seconds(1.0))
    with pytest.raises(AudioError, match=r"offset = 1\.0 s: the file is 1\.000 s long; correct the row"):
        read_audio(path, offset=Seconds(1.0))
    assert len(read_audio(path, duration=Seconds(1.05))) == 16_000


@pytest.mark.parametrize("offset,duration", [(-1.0, None), (float("nan"), None), (0.0, 0.0), (0.0, float("inf"))])
def test_spans_that_make_no_sense_are_refused(wav: Wav, offset: float, duration: float | None) -> None:
    with pytest.raises(AudioError, match=r"(offset|duration) = \S+: must be"):
        read_audio(wav(), offset=Seconds(offset), duration=None if duration is None else Seconds(duration))


def test_what_is_no_sound_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"not a sound")
    (tmp_path / "a.raw").write_bytes(b"\0" * 100)
    (tmp_path / "empty.wav").write_bytes(b"")
    for name in ("a.wav", "a.raw", "empty.wav"):
        with pytest.raises(AudioError, match=rf"{name}: cannot be opened as sound: .*; the file is damaged"):
            read_audio(tmp_path / name)
    for path in (tmp_path / "gone.wav", tmp_path):
        with pytest.raises(AudioError, match=r"no such file; correct the path"):
            audio_info(path)
    with pytest.raises(AudioError, match=r"audio of 3 bytes: cannot be opened"):
        read_audio(b"abc")


def test_a_zero_byte_in_a_path_cannot_open_another_file(wav: Wav) -> None:
    with pytest.raises(AudioError, match="zero byte"):
        read_audio(f"{wav('a.wav')}\0.txt")


def test_a_damaged_header_in_memory_is_refused_without_noise(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.aiff", np.zeros(100), 16_000)
    data = bytearray((tmp_path / "a.aiff").read_bytes())
    data[38] = 255  # libsndfile then seeks before the start, which must not print a traceback
    with pytest.raises(AudioError, match="cannot be opened as sound"):
        read_audio(bytes(data))


def test_a_file_without_samples_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0, np.float32), 16_000)
    with pytest.raises(AudioError, match="holds no sound"):
        read_audio(tmp_path / "a.wav")


def test_a_flac_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.flac", noise(32_000), 16_000)
    data = (tmp_path / "a.flac").read_bytes()
    with pytest.raises(AudioError):
        read_audio(data[: len(data) // 2])


def test_samples_that_are_not_finite_are_refused_both_ways(tmp_path: Path) -> None:
    x_N = noise(100)
    x_N[3] = np.nan
    soundfile.write(tmp_path / "a.wav", x_N, 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match="not finite"):
        read_audio(tmp_path / "a.wav")
    with pytest.raises(AudioError, match="finite"):
        write_audio(tmp_path / "b.wav", x_N, 16_000)


def test_writing_names_the_formats_it_knows(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"must end in \.wav or \.flac"):
        write_audio(tmp_path / "a.mp3", noise(10), 16_000)
    with pytest.raises(AudioError, match="cannot be written"):
        write_audio(tmp_path / "gone" / "a.wav", noise(10), 16_000)


def test_an_audio_error_is_a_corpus_error() -> None:
    assert issubclass(AudioError, CorpusError)
