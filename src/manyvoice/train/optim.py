"""Optimisers: ScaledAdam for supernets, AdamW with the usual exceptions from decay.

S  tensors of one shape, stacked and stepped together
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median_high
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import ParamsT

from manyvoice.errors import UsageError

OptimizerName = Literal["adamw", "scaledadam"]

# icefall's zipformer recipe, optim.py at commit 36e0420c
SCALAR_LR = 0.1  # scalars and the learned scales move at a tenth of the rate
SCALAR_LIMIT = 10.0
RMS_FLOOR, RMS_CEILING = 1e-5, 3.0
SCALE_PERIOD = 4  # steps between two updates of a tensor's scale
SCALE_STEP_LIMIT = 0.1
NORMS_KEPT = 100
EARLY_NORMS, EARLY_SLACK = (10, 20, 40), 2.0
CORRECTED_BELOW = 0.99


@final
class ScaledAdam(Optimizer):
    """Adam whose update follows each tensor's own scale, and which learns that scale. Yao et al., arXiv:2310.11230.

    For a tensor w with gradient g, rms = root mean square of w (refreshed every 4 steps), and every quantity its own::

        v <- b2 v + (1 - b2) g^2                           v / (1 - b2^t) while that correction is below 0.99
        d  = -lr g / (sqrt(v) + eps) max(rms, 1e-5)        scalars: -0.1 lr g / (sqrt(v) + eps)
        every 4 steps, over the last four h = <w, g>, for the j-th time:
            u <- b2^4 u + (1 - b2^4) mean(h^2)
            s  = -0.1 lr sqrt(1 - b2^(4j)) sum(h) / (sqrt(u) + eps), 0 if rms < 1e-5, in [-0.1, 0.1], <= (3 - rms) / rms
            d <- d + w s
        m <- b1 m + (1 - b1) d;  w <- w + m                scalars stay in [-10, 10]

    Before that the gradients of a group are clipped: their norm, each tensor's gradient times its rms (a scalar's times
    0.1), may be ``clipping_scale`` times the median of the last 100 norms. The limit is set after 10, 20 and 40 norms
    with a slack of 2, then after every 100. A norm that is not finite sets all gradients of that step to zero, is left
    out of the median, and counts in ``skipped_steps``.

    A parameter whose ``grad`` is None is not touched: no momentum, no decay, no tick of its own step counter, so a
    subnet leaves what it does not contain bit for bit as it was.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either.
        lr: size of a step relative to a tensor's rms.  betas: (b1, b2).
        clipping_scale: None leaves the gradients unclipped.
        stack_elements: a stack holds at most this many elements, 0 steps each tensor alone; larger tensors gain
            nothing from stacking and would cost a copy.
    Raises: UsageError for settings out of range, for parameters below float32, and for sparse gradients.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.03,
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        clipping_scale: float | None = 2.0,
        stack_elements: int = 2**22,
    ):
        _check(lr, betas, eps)
        if clipping_scale is not None and not clipping_scale > 0:
            raise UsageError(f"clipping_scale must be above 0, but is {clipping_scale}; None turns clipping off")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "clipping_scale": clipping_scale}
        clip_state = {"norms": (), "norm_count": 0, "norm_limit": None, "skipped_steps": 0}
        super().__init__(params, defaults | clip_state)
        self._stack_elements = stack_elements

    @property
    def skipped_steps(self) -> int:
        """Steps whose gradients were set to zero because their norm was not finite."""
        return int(self.param_groups[0]["skipped_steps"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = [[p for p in g["params"] if p.grad is not None and p.numel()] for g in self.param_groups]
        for p in (p for params in present for p in params):
            self._prepare(p)
        for group, params, scale in zip(self.param_groups, present, self._clip_scales(present), strict=True):
            for stack in self._stacks(params):
                self._step_stack(stack, group, scale)
        return loss

    def _prepare(self, p: Tensor) -> None:
        if p.grad is not None and p.grad.is_sparse:
            raise UsageError(
                f"a parameter of shape {tuple(p.shape)} has a sparse gradient; ScaledAdam wants dense ones"
            )
        if p.dtype not in (torch.float32, torch.float64):
            raise UsageError(
                f"ScaledAdam steps float32 and float64, but a parameter is {p.dtype}; use autocast instead"
            )
        state = self.state[p]
        if state:
            return
        state["step"] = 0
        state["momentum"] = torch.zeros_like(p)
        state["square"] = torch.zeros_like(p)
        if p.numel() > 1:
            state["rms"] = _rms_S(p[None])[0]
            state["dots"] = p.new_zeros(SCALE_PERIOD)
            state["dot_square"] = p.new_zeros(())

    def _clip_scales(self, present: Sequence[Sequence[Tensor]]) -> list[float]:
        """What to multiply each group's gradients by; zeroes all gradients if a norm is not finite."""
        norms = [self._norm(params) for params in present if params]
        found = iter(torch.stack([n.to(norms[0]) for n in norms]).tolist() if norms else [])
        values = [next(found) if params else None for params in present]
        if all(value is None or math.isfinite(value) for value in values):
            return [1.0 if v is None else _clip(g, v) for g, v in zip(self.param_groups, values, strict=True)]
        for group, params in zip(self.param_groups, present, strict=True):
            group["skipped_steps"] += 1
            if params:
                torch._foreach_zero_(_grads(params))
        return [1.0] * len(present)

    def _norm(self, params: Sequence[Tensor]) -> Tensor:
        norms = torch._foreach_norm(_grads(params))
        scales = [self.state[p].get("rms", SCALAR_LR) for p in params]
        scaled = [(n * s).to(norms[0]) for n, s in zip(norms, scales, strict=True)]
        return torch.stack(scaled).square().sum().sqrt()

    def _stacks(self, params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters of one shape at one step of their own, so that a stack shares its bias corrections."""
        same: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
        for p in params:
            same[p.shape, p.dtype, p.device, self.state[p]["step"]].append(p)
        for alike in same.values():
            rows = max(1, self._stack_elements // alike[0].numel())
            yield from (alike[i : i + rows] for i in range(0, len(alike), rows))

    def _step_stack(self, params: list[Tensor], group: dict[str, Any], scale: float) -> None:
        states = [self.state[p] for p in params]
        step = states[0]["step"] + 1
        (b1, b2), lr, scalar = group["betas"], group["lr"], params[0].numel() == 1
        gathered = {key: _stacked([s[key] for s in states]) for key in states[0] if key != "step"}
        w, m, v = _stacked(params), gathered["momentum"], gathered["square"]
        g = _stacked(_grads(params)) * scale

        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        correction = 1 - b2**step
        root = (v / correction if correction < CORRECTED_BELOW else v).sqrt().add_(group["eps"])
        d = (g / root).mul_(-lr * SCALAR_LR if scalar else -lr)
        if not scalar:
            change_S = _scale_change_S(w, g, gathered, step, group)
            d.mul_(_rows(gathered["rms"].clamp(min=RMS_FLOOR), d))
            if change_S is not None:
                d.addcmul_(w, _rows(change_S, w))
        m.mul_(b1).add_(d, alpha=1 - b1)
        w.add_(m)
        if scalar:
            w.clamp_(-SCALAR_LIMIT, SCALAR_LIMIT)

        for state in states:
            state["step"] = step
        if len(params) > 1:  # one tensor alone was changed in place
            torch._foreach_copy_(params, list(w.unbind()))
            for key, rows in gathered.items():
                torch._foreach_copy_([s[key] for s in states], list(rows.unbind()))


def _scale_change_S(w: Tensor, g: Tensor, state: dict[str, Tensor], step: int, group: dict[str, Any]) -> Tensor | None:
    """The relative change s of each tensor's scale, None between two updates; refreshes ``rms`` with it."""
    dots_SP, rms_S, square_S = state["dots"], state["rms"], state["dot_square"]
    dots_SP[:, (step - 1) % SCALE_PERIOD] = (w * g).flatten(1).sum(1)
    if step % SCALE_PERIOD:
        return None
    rms_S.copy_(_rms_S(w))
    b2 = group["betas"][1] ** SCALE_PERIOD
    square_S.mul_(b2).add_(dots_SP.square().mean(1), alpha=1 - b2)
    correction = math.sqrt(1 - b2 ** (step // SCALE_PERIOD))
    s_S = dots_SP.sum(1) / (square_S.sqrt() + group["eps"]) * (-SCALAR_LR * group["lr"] * correction)
    s_S = s_S.masked_fill(rms_S < RMS_FLOOR, 0.0).clamp(-SCALE_STEP_LIMIT, SCALE_STEP_LIMIT)
    return torch.minimum(s_S, (RMS_CEILING - rms_S) / rms_S.clamp(min=RMS_FLOOR))


def _clip(group: dict[str, Any], norm: float) -> float:
    if group["clipping_scale"] is None:
        return 1.0
    group["norm_count"] += 1
    group["norms"] = (*group["norms"], norm)[-NORMS_KEPT:]
    early = group["norm_count"] in EARLY_NORMS
    if early or group["norm_count"] % NORMS_KEPT == 0:
        slack = EARLY_SLACK if early else 1.0
        group["norm_limit"] = group["clipping_scale"] * slack * median_high(group["norms"])
    limit = group["norm_limit"]
    # a limit of 0 comes from gradients that were all zero; it would hold back every later one
    return limit / norm if limit and norm > limit else 1.0


def _grads(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _rms_S(w: Tensor) -> Tensor:
    return w.flatten(1).square().mean(1).sqrt()


def _rows(x_S: Tensor, like: Tensor) -> Tensor:
    return x_S.view(-1, *[1] * (like.ndim - 1))


def build_optimizer(
    model_parameters: Iterable[tuple[str, nn.Parameter]],
    name: OptimizerName,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> Optimizer:
    """The optimiser of a run over the parameters that want a gradient; its groups remember their names.

    AdamW decays matrices only: biases, norms and everything else of one dimension are left alone.

    Args: model_parameters: (name, parameter), such as ``model.named_parameters()``.
    Raises: UsageError if a setting is out of range, nothing is trainable, or ScaledAdam is asked to decay.
    """
    _check(lr, betas, eps)
    if not weight_decay >= 0:
        raise UsageError(f"weight_decay must be 0 or more, but is {weight_decay}")
    named = [(n, p) for n, p in model_parameters if p.requires_grad]
    if not named:
        raise UsageError("there is nothing to train: no parameter wants a gradient; unfreeze some or add a submodel")
    if name == "scaledadam":
        if weight_decay:
            raise UsageError(f"weight_decay must be 0 for scaledadam, which learns scales, but is {weight_decay}")
        return ScaledAdam(named, lr, betas=betas, eps=eps)
    if name != "adamw":
        raise UsageError(f"optimizer must be adamw or scaledadam, but is {name!r}")
    decayed = [(n, p) for n, p in named if _decays(n, p)]
    spared = [(n, p) for n, p in named if not _decays(n, p)]
    groups = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((decayed, weight_decay), (spared, 0.0))
        if members
    ]
    # fused: a small model is hundreds of small tensors, and tensor by tensor each costs a dozen calls
    return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def _decays(name: str, p: Tensor) -> bool:
    # relative-position attention keeps its biases as matrices: bias_u, bias_v
    last = name.rpartition(".")[2]
    return p.ndim > 1 and last != "bias" and not last.startswith("bias_")


def _check(lr: float, betas: tuple[float, float], eps: float) -> None:
    if not (math.isfinite(lr) and lr >= 0):
        raise UsageError(f"lr must be a finite number of 0 or more, but is {lr}")
    if not all(0 <= b < 1 for b in betas):
        raise UsageError(f"betas must be in [0, 1), but are {betas}; 0.9 and 0.98 are usual")
    if not eps > 0:
        raise UsageError(f"eps must be above 0, but is {eps}; 1e-8 is usual")
