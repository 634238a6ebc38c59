"""Real-time factors with a clock that the test turns, so nothing depends on how busy the machine is."""

from __future__ import annotations

import getpass
import json
import os
import platform

import pytest
import torch

from manyvoice.decode import speed
from manyvoice.decode.speed import Speed, machine, measure_speed
from manyvoice.errors import DecodeError


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until somebody works."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(speed.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_the_median_of_the_repeats_after_the_warm_up(clock):
    costs = iter([50.0, 40.0, 2.0, 1.0, 6.0])

    def run() -> None:
        clock.now += next(costs)

    found = measure_speed(run, 8.0, warmup=2, repeats=3)
    assert found.seconds == (2.0, 1.0, 6.0)
    assert (found.median, found.best, found.spread) == (2.0, 1.0, 2.5)
    assert (found.rtf, found.rtfx) == (0.25, 4.0)


def test_by_default_one_warm_up_and_five_repeats(clock):
    calls = []

    def run() -> None:
        calls.append(clock.now)
        clock.now += 1.0

    assert len(measure_speed(run, 1.0).seconds) == 5
    assert len(calls) == 6


def test_work_that_an_accelerator_does_later_is_waited_for(clock, monkeypatch):
    queued = []

    def finish() -> None:
        clock.now += sum(queued)
        queued.clear()

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", finish)
    found = measure_speed(lambda: queued.append(3.0), 6.0, warmup=1, repeats=2)
    assert found.seconds == (3.0, 3.0), "the warm-up must not leak into the first repeat, nor work be left uncounted"


def test_a_speed_is_json():
    stored = json.loads(json.dumps(Speed(seconds=(1.0, 2.0, 4.0), seconds_of_audio=10.0).as_dict()))
    assert stored == {
        "rtf": 0.2,
        "rtfx": 5.0,
        "median_seconds": 2.0,
        "best_seconds": 1.0,
        "spread": 1.5,
        "repeats": 3,
        "seconds_of_audio": 10.0,
    }


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_without_audio_there_is_no_factor(seconds):
    with pytest.raises(DecodeError, match="seconds_of_audio = .* must be above 0"):
        measure_speed(lambda: None, seconds)


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}])
def test_repeats_and_warm_up_have_a_rule(wrong):
    with pytest.raises(DecodeError, match="at least 1 measured run and no negative warm-up"):
        measure_speed(lambda: None, 1.0, **wrong)


def test_a_run_too_short_for_the_clock_is_refused(clock):
    with pytest.raises(DecodeError, match="no time that the clock can see"):
        measure_speed(lambda: None, 1.0)


def test_a_machine_is_described_without_saying_whose_it_is():
    found = machine()
    assert list(found) == ["processor", "cores", "threads", "accelerator", "torch", "python", "platform"]
    assert found["threads"] == torch.get_num_threads() and found["torch"] == torch.__version__
    assert isinstance(found["cores"], int) and 1 <= found["cores"] <= (os.cpu_count() or 1)
    text = json.dumps(found)
    assert found["processor"] and str(found["python"]) == platform.python_version()
    assert not any(private in text for private in (platform.node(), os.path.expanduser("~"), os.getcwd()) if private)
    assert os.sep not in str(found["platform"]) and getpass.getuser() not in str(found["platform"])


def test_several_accelerators_are_counted(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Accelerator X")
    assert machine()["accelerator"] == "2 x Accelerator X"


def test_a_machine_without_cpuinfo_still_has_a_processor(monkeypatch):
    monkeypatch.setattr(speed.Path, "is_file", lambda path: False)
    monkeypatch.setattr(speed.platform, "processor", lambda: "")
    assert machine()["processor"] == platform.machine()
