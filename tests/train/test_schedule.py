from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.errors import UsageError
from manyvoice.train.schedule import Constant, Eden, InverseSqrt, OneCycle, apply, build_schedule

NAMES = ("onecycle", "eden", "inverse-sqrt", "constant")


def rates(schedule, steps):
    return [schedule.lr(step, 0.0) for step in range(steps)]


def test_one_cycle_climbs_in_a_line_and_falls_in_half_a_cosine():
    schedule = OneCycle(peak=2.0, total_steps=13, warmup=4 / 13, final_divisor=10)
    assert rates(schedule, 4) == [0.5, 1.0, 1.5, 2.0]
    final = 0.2
    for step in range(4, 13):
        expected = final + (2.0 - final) * (1 + math.cos(math.pi * (step - 3) / 9)) / 2
        assert schedule.lr(step, 0.0) == pytest.approx(expected, rel=1e-12)
    assert schedule.lr(12, 0.0) == pytest.approx(final)
    assert schedule.lr(500, 0.0) == schedule.lr(12, 0.0), "past the end the last rate stays"


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_one_cycle_of_one_step_is_its_peak(warmup):
    schedule = OneCycle(peak=0.3, total_steps=1, warmup=warmup, final_divisor=100)
    assert schedule.lr(0, 0.0) == 0.3
    assert schedule.lr(1, 0.0) == pytest.approx(0.003)


def test_eden_is_the_published_formula():
    schedule = Eden(base=0.045)
    for step, epoch in [(500, 0.0), (7500, 1.25), (40_000, 30.0)]:
        by_step = ((step**2 + 7500**2) / 7500**2) ** -0.25
        by_epoch = ((epoch**2 + 3.5**2) / 3.5**2) ** -0.25
        assert schedule.lr(step, epoch) == pytest.approx(0.045 * by_step * by_epoch, rel=1e-12)


def test_eden_warms_up_from_a_tenth_over_500_steps():
    schedule = Eden(base=1.0, steps=1e9)
    assert schedule.lr(0, 0.0) == pytest.approx(0.1)
    assert schedule.lr(250, 0.0) == pytest.approx(0.55)
    assert schedule.lr(500, 0.0) == pytest.approx(1.0)


def test_inverse_sqrt_meets_its_peak_and_halves_at_four_times_the_warmup():
    schedule = InverseSqrt(peak=1.0, warmup_steps=10)
    assert schedule.lr(0, 0.0) == pytest.approx(0.1)
    assert schedule.lr(9, 0.0) == 1.0
    assert schedule.lr(39, 0.0) == pytest.approx(0.5)


def test_constant_warms_up_and_stays():
    assert rates(Constant(peak=1.0, warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(Constant(peak=1.0), 2) == [1.0, 1.0]


@given(
    name=st.sampled_from(NAMES),
    peak=st.floats(1e-6, 10.0),
    total=st.integers(1, 300),
    share=st.floats(0.0, 1.0),
    epoch=st.floats(0.0, 50.0),
)
def test_every_schedule_rises_then_falls_and_stays_between_nought_and_its_peak(name, peak, total, share, epoch):
    warmup = max(1, math.floor(share * total))
    schedule = build_schedule(name, lr=peak, total_steps=total, warmup_steps=warmup, eden_steps=2000.0)
    lrs = [schedule.lr(step, epoch) for step in range(total + 20)]
    assert all(0 < lr <= peak * (1 + 1e-12) for lr in lrs)
    assert all(a <= b for a, b in pairwise(lrs[:warmup])), "falls during the warm-up"
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(lrs[warmup:])), "rises after the warm-up"


@given(total=st.integers(1, 10**7), data=st.data())
def test_one_cycle_keeps_a_warmup_given_in_steps(total, data):
    warmup = data.draw(st.integers(1, total))
    schedule = build_schedule("onecycle", lr=1.0, total_steps=total, warmup_steps=warmup)
    assert schedule.lr(warmup - 1, 0.0) == 1.0
    assert warmup < 2 or schedule.lr(warmup - 2, 0.0) < 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0, but is 0.0"),
        ({"lr": math.nan}, "lr must be above 0, but is nan"),
        ({"lr": math.inf}, "lr must be above 0, but is inf"),
        ({"warmup_steps": 11}, "warmup_steps must be 0 to total_steps, 10, but is 11"),
        ({"total_steps": 0}, "total_steps must be 1 or more, but is 0"),
        ({"final_divisor": 0.5}, "final_divisor must be 1 or more, but is 0.5"),
        ({"name": "eden", "eden_epochs": 0}, "eden_epochs must be above 0, but is 0"),
        ({"name": "inverse-sqrt", "warmup_steps": 0}, "warmup_steps must be 1 or more"),
        ({"name": "constant", "warmup_steps": -1}, "warmup_steps must be 0 or more, but is -1"),
        ({"name": "linear"}, "schedule must be onecycle, eden, inverse-sqrt or constant, but is 'linear'"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(change, message):
    settings = {"name": "onecycle", "lr": 1.0, "total_steps": 10, "warmup_steps": 2} | change
    with pytest.raises(UsageError, match=message):
        build_schedule(**settings)


def test_apply_sets_every_group():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": torch.tensor(1.0)}], lr=1.0)
    kept = optimizer.param_groups[1]["lr"]
    apply(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[1]["lr"] is kept and kept.item() == 0.25
