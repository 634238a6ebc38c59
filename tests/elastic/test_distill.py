"""Divergences against sums written out, and the surrogate's gradient against that of the divergence itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyvoice.elastic.distill import (
    adaptive_alpha,
    alpha_divergence,
    clipped_divergence,
    frames_distilled,
    kl,
    surrogate,
)

ALPHAS = [-1.0, -0.5, 0.0, 0.3, 1.0, 2.0]


def scores(seed: int, spread: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 4, 5, generator=gen, dtype=torch.float64) * spread
    return teacher, student.requires_grad_()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_divergence_is_its_definition(alpha: float) -> None:
    teacher, student = scores(0)
    p, q = teacher.softmax(-1), student.softmax(-1)
    t = p / q
    if alpha == 1:
        expected = (q * t * t.log()).sum(-1)
    elif alpha == 0:
        expected = -(q * t.log()).sum(-1)
    else:
        expected = (q * (t**alpha / (alpha * (alpha - 1)) - 1 / (alpha * (alpha - 1)))).sum(-1)
    torch.testing.assert_close(alpha_divergence(teacher, student, alpha), expected)
    assert (expected >= 0).all()
    torch.testing.assert_close(alpha_divergence(teacher, teacher, alpha), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_surrogate_has_the_divergence_s_gradient(alpha: float) -> None:
    teacher, student = scores(1)
    (wanted,) = torch.autograd.grad(alpha_divergence(teacher, student, alpha).sum(), student)
    (found,) = torch.autograd.grad(surrogate(teacher, student, alpha, clip=1e9).sum(), student)
    torch.testing.assert_close(found, wanted)


def test_weights_are_clipped() -> None:
    teacher = torch.tensor([[0.0, -20.0]], dtype=torch.float64)
    student = torch.tensor([[-2.0, 2.0]], dtype=torch.float64, requires_grad=True)
    for alpha in (-1.0, 2.0):
        (free,) = torch.autograd.grad(surrogate(teacher, student, alpha, clip=1e12).sum(), student)
        (clipped,) = torch.autograd.grad(surrogate(teacher, student, alpha).sum(), student)
        assert clipped.abs().max() < 6 < 12 < free.abs().max()


@given(seed=st.integers(0, 1000), spread=st.floats(0.1, 60))
def test_the_larger_divergence_decides_and_all_is_finite(seed: int, spread: float) -> None:
    teacher, student = scores(seed, spread)
    found = adaptive_alpha(teacher, student)
    low, high = (clipped_divergence(teacher, student, a) for a in (-1.0, 1.0))
    expected = torch.where(low > high, surrogate(teacher, student, -1.0), surrogate(teacher, student, 1.0))
    assert torch.equal(found, expected) and torch.isfinite(found).all()
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert torch.isfinite(gradient).all()


def test_kl_is_cross_entropy() -> None:
    teacher, student = scores(2)
    expected = torch.nn.functional.cross_entropy(student, teacher.softmax(-1), reduction="none")
    torch.testing.assert_close(kl(teacher, student), expected)


def test_padding_and_the_teacher_are_left_out() -> None:
    teacher, student = (torch.randn(2, 3, 5, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = frames_distilled(kl, teacher, student, mask)
    found.sum().backward()
    assert teacher.grad is None and student.grad is not None
    assert not student.grad[~mask].any() and student.grad[mask].abs().sum() > 0
    torch.testing.assert_close(found, (kl(teacher, student) * mask).sum(1))
