"""The rule for BatchNorm, against plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from manyvoice.models.batchnorm import MaskedBatchNorm, freeze, masked_norms, recalibrate, settle


def reference(x_BDT: Tensor, mask_BT: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """Normalise by the mean and variance of the frames inside utterances, as frames in a list."""
    inside = x_BDT.transpose(1, 2)[mask_BT]
    mean, var = inside.mean(0), inside.var(0, unbiased=False)
    y = (x_BDT - mean[:, None]) / (var[:, None] + norm.eps).sqrt()
    return y * norm.weight[:, None] + norm.bias[:, None]


@pytest.fixture
def norm() -> MaskedBatchNorm:
    stock = nn.BatchNorm1d(4).double()
    stock.weight.data, stock.bias.data = torch.randn(4).double(), torch.randn(4).double()
    return MaskedBatchNorm.around(stock)


X = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.arange(10) < torch.tensor([10, 6, 3])[:, None]


def test_statistics_cover_valid_frames_only(norm: MaskedBatchNorm) -> None:
    norm.see(MASK)
    torch.testing.assert_close(norm(X), reference(X, MASK, norm))


def test_one_micro_batch_without_padding_is_stock_batchnorm() -> None:
    stock = nn.BatchNorm1d(4).double()
    ours = MaskedBatchNorm.around(nn.BatchNorm1d(4).double())
    torch.testing.assert_close(ours(X), stock(X))
    settle(ours)
    torch.testing.assert_close(ours.running_mean, stock.running_mean)
    torch.testing.assert_close(ours.running_var, stock.running_var)
    assert ours.num_batches_tracked == stock.num_batches_tracked == 1


def test_statistics_move_once_a_step_by_the_mean_over_micro_batches(norm: MaskedBatchNorm) -> None:
    before = norm.running_mean.clone()
    for part in (X[:1], X[1:]):
        norm(part)
    assert torch.equal(norm.running_mean, before), "statistics must wait for settle"
    settle(norm)
    mean = (X[:1].mean((0, 2)) + X[1:].mean((0, 2))) / 2
    torch.testing.assert_close(norm.running_mean, before + 0.1 * (mean - before))
    assert norm.pending == []


def test_a_norm_that_saw_nothing_is_left_alone(norm: MaskedBatchNorm) -> None:
    before = {n: b.clone() for n, b in norm.named_buffers()}
    settle(norm)
    assert all(torch.equal(before[n], b) for n, b in norm.named_buffers())


def test_frozen_is_inference_with_gradients(norm: MaskedBatchNorm) -> None:
    freeze(norm)
    y = norm.train()(X)
    torch.testing.assert_close(y, norm.eval()(X))
    y.sum().backward()
    assert norm.weight.grad is not None and norm.pending == []


def test_recalibration_is_the_plain_mean_and_changes_nothing_else(norm: MaskedBatchNorm) -> None:
    model = nn.Sequential(norm).train()
    norm.running_mean.fill_(99.0)
    norm.see(None)
    recalibrate(model, iter([lambda: model(X[:1]), lambda: model(X[1:2]), lambda: model(X[2:])]))
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(1) for x in X]).mean(0))
    assert (norm.momentum, norm.frozen, norm.training) == (0.1, False, True)


def test_names_of_parameters_and_buffers_are_stock() -> None:
    stock = nn.BatchNorm1d(4)
    assert set(MaskedBatchNorm.around(stock).state_dict()) == set(stock.state_dict())
    assert len(list(masked_norms(nn.Sequential(stock, MaskedBatchNorm(4))))) == 1


def test_bfloat16_is_summed_in_float32(norm: MaskedBatchNorm) -> None:
    x = torch.full((2, 4, 4096), 3.0, dtype=torch.bfloat16)
    single = MaskedBatchNorm.around(nn.BatchNorm1d(4))
    assert single(x).dtype == torch.bfloat16
    settle(single)
    torch.testing.assert_close(single.running_mean, torch.full((4,), 0.3))
