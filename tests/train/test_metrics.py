"""The log of a run: cut back on resume, and honest about padding."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from manyvoice.errors import CheckpointError
from manyvoice.train.interrupt import Interrupt
from manyvoice.train.metrics import MetricsLog, Pace, read_metrics


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with MetricsLog(tmp_path, resume_at=3, tensorboard=False) as log:
        log.write({"step": 4, "loss": 9.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)][2:] == [(3, 1 / 3), (4, 9.0)]


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be written"):
        MetricsLog(tmp_path / "nowhere", tensorboard=False)


def test_padding_is_a_share_of_frames_and_time_left_follows_the_pace() -> None:
    pace = Pace(epochs=2)
    assert pace.left(0.0) is None
    line = pace.line({"epoch": 0.5, "frames": 60.0, "padded_frames": 80.0, "audio_seconds": 1.0})
    assert line["padding"] == pytest.approx(0.25)
    assert line["memory_mib"] > 10
    pace.line({"epoch": 1.0, "frames": 60.0, "padded_frames": 80.0, "audio_seconds": 1.0})
    left = pace.left(1.0)
    assert left is not None and left >= 0


def test_the_first_signal_asks_and_the_second_ends() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.asked == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
