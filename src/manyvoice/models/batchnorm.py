"""The rule for BatchNorm: statistics know nothing of padding, of micro-batches or of ranks.

    1  In training the mean and variance of a batch cover the frames inside the utterances only.
    2  The running statistics move once a step, by the mean of the micro-batches' statistics over all ranks.
    3  Fine-tuning may freeze them: then training normalises as inference does.
    4  A model whose weights were averaged or narrowed has its statistics measured again before it is used.

Stock BatchNorm counts padded frames and moves with each micro-batch, so its results depend on batch mates and on
the number of ranks. Parameters and buffers keep their names: the saved folder is an ordinary one.

    B  utterances   D  channels   T  frames
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Batches from which statistics are measured again, as AlphaNet does (arXiv:2102.07954, its published code).
RECALIBRATION_BATCHES = 64


@final
class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over x_BDT whose batch statistics cover valid frames only (Ioffe & Szegedy, arXiv:1502.03167).

    The owner calls :meth:`see` with the mask of the batch before the forward pass. In evaluation mode, or frozen,
    it is stock BatchNorm. Statistics of a training pass wait in ``pending`` until :func:`settle` applies them.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.mask_BT: Tensor | None = None
        self.frozen = False
        self.recording = True
        self.pending: list[tuple[Tensor, Tensor]] = []  # mean and unbiased variance of each micro-batch of the step

    @classmethod
    def around(cls, stock: nn.BatchNorm1d) -> MaskedBatchNorm:
        """The same parameters and buffers under the masked rule."""
        norm = cls(stock.num_features, stock.eps, stock.momentum)
        norm.weight, norm.bias = stock.weight, stock.bias
        norm.running_mean, norm.running_var = stock.running_mean, stock.running_var
        norm.num_batches_tracked = stock.num_batches_tracked
        norm.training = stock.training
        return norm

    def see(self, mask_BT: Tensor | None) -> None:
        """Set the valid frames of the batch about to be normalised; None is all of them."""
        self.mask_BT = mask_BT

    def forward(self, x_BDT: Tensor) -> Tensor:
        """B D T in, B D T out."""
        if not self.training or self.frozen:
            return nn.functional.batch_norm(
                x_BDT, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        x = x_BDT.to(torch.promote_types(x_BDT.dtype, torch.float32))  # sums over 10^4 frames want more than bf16
        if self.mask_BT is None:
            n, mean_D = x.new_tensor(float(x.shape[0] * x.shape[2])), x.mean((0, 2))
            var_D = (x - mean_D[:, None]).square().mean((0, 2))
        else:
            mask_B1T = self.mask_BT[:, None].to(x.dtype)
            n = mask_B1T.sum()
            mean_D = (x * mask_B1T).sum((0, 2)) / n
            var_D = ((x - mean_D[:, None]).square() * mask_B1T).sum((0, 2)) / n
        if self.recording:
            with torch.no_grad():
                unbiased_D = var_D * n / (n - 1).clamp(min=1)
                self.pending.append((mean_D.detach().clone(), unbiased_D.detach()))
        scale_D = self.weight * torch.rsqrt(var_D + self.eps)
        shift_D = self.bias - mean_D * scale_D
        return (x * scale_D[:, None] + shift_D[:, None]).to(x_BDT.dtype)


def masked_norms(model: nn.Module) -> Iterator[MaskedBatchNorm]:
    """Every norm of the model that follows the rule."""
    return (m for m in model.modules() if isinstance(m, MaskedBatchNorm))


def freeze(model: nn.Module, frozen: bool = True) -> None:
    """Normalise with the running statistics in training too, and leave them alone."""
    for norm in masked_norms(model):
        norm.frozen = frozen


@contextmanager
def unrecorded(model: nn.Module) -> Iterator[None]:
    """Inside, batches are normalised as ever but leave nothing behind: a subnet's are not the whole model's."""
    norms = list(masked_norms(model))
    for norm in norms:
        norm.recording = False
    try:
        yield
    finally:
        for norm in norms:
            norm.recording = True


def discard(model: nn.Module) -> None:
    """Forget what the norms have seen since they were last settled: that step is tried again."""
    for norm in masked_norms(model):
        norm.pending.clear()


@torch.no_grad()
def settle(model: nn.Module, *, alone: bool = False) -> None:
    """Move the running statistics by the mean of what the step's micro-batches saw on all ranks; once a step.

    A norm that saw nothing anywhere is left as it is: a subnet may have skipped its module.

    Args: alone: this process has seen all there is; the other ranks do not take part.
    """
    norms = list(masked_norms(model))
    if not norms:
        return
    flat = torch.cat([_pending_sum(norm) for norm in norms])
    if not alone and dist.is_available() and dist.is_initialized():
        dist.all_reduce(flat)
    for norm, sums in zip(norms, flat.split([2 * n.num_features + 1 for n in norms]), strict=True):
        norm.pending.clear()
        count = float(sums[-1])
        if count == 0 or norm.running_mean is None or norm.running_var is None:
            continue
        mean_D, var_D = (sums[:-1] / count).to(norm.running_mean.dtype).split(norm.num_features)
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        # momentum None is the cumulative mean, which recalibration uses
        momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean_D, momentum)
        norm.running_var.lerp_(var_D, momentum)


@torch.no_grad()
def recalibrate(model: nn.Module, forwards: Iterator[Callable[[], object]]) -> None:
    """Measure the running statistics again as the plain mean over some forward passes; the rest stays in inference.

    One process does it, without the others.

    Args: forwards: each runs the model on one batch of training data without augmentation.
    """
    norms = list(masked_norms(model))
    before = [(norm.momentum, norm.frozen) for norm in norms]
    was_training = model.training
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum, norm.frozen = None, False
    for forward in forwards:
        forward()
        settle(model, alone=True)
    for norm, (momentum, frozen) in zip(norms, before, strict=True):
        norm.momentum, norm.frozen = momentum, frozen
    model.train(was_training)


def _pending_sum(norm: MaskedBatchNorm) -> Tensor:
    """Sums of means and of variances, and how many, in one vector of float64."""
    assert norm.running_mean is not None
    device = norm.running_mean.device
    if not norm.pending:
        return torch.zeros(2 * norm.num_features + 1, dtype=torch.float64, device=device)
    means, variances = zip(*norm.pending, strict=True)
    count = torch.tensor([float(len(means))], dtype=torch.float64, device=device)
    return torch.cat([torch.stack(means).double().sum(0), torch.stack(variances).double().sum(0), count])
