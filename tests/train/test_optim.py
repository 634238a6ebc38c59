from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from manyvoice.errors import UsageError
from manyvoice.train.optim import ScaledAdam, build_optimizer

SHAPES = {
    "matrix": (3, 4),
    "twin": (3, 4),
    "triplet": (3, 4),
    "vector": (5,),
    "scalar": (),
    "one": (1,),
    "box": (2, 1, 3),
}


def parameters(shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype) * 0.3) for name, shape in shapes.items()
    }


def gradients(step, shapes=SHAPES, dtype=torch.float64):
    """Random gradients, a sudden loud one now and then, about a third of them absent."""
    generator = torch.Generator().manual_seed(1000 + step)
    loud = 50.0 if step % 17 == 13 else 1.0
    grads = {name: torch.randn(shape, generator=generator, dtype=dtype) * loud for name, shape in shapes.items()}
    absent = torch.rand(len(shapes), generator=generator) < 0.35
    return {name: None if gone else grads[name] for name, gone in zip(shapes, absent, strict=True)}


def run(optimizer, named, steps, grads=gradients):
    for step in steps:
        for name, p in named.items():
            grad = grads(step)[name]
            p.grad = None if grad is None else grad.clone()
        optimizer.step()


class PlainScaledAdam:
    """ScaledAdam one tensor at a time, line by line from its formulas, slow on purpose."""

    def __init__(self, weights, lr, b1=0.9, b2=0.98, eps=1e-8):
        self.w = {name: w.detach().clone() for name, w in weights.items()}
        self.lr, self.b1, self.b2, self.eps = lr, b1, b2, eps
        self.t = dict.fromkeys(weights, 0)
        self.m = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.v = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.u = dict.fromkeys(weights, 0.0)
        self.h = {name: [] for name in weights}
        self.rms = {}
        self.norms, self.limit, self.clipped = [], None, 0

    def step(self, grads):
        grads = {name: g for name, g in grads.items() if g is not None}
        for name in grads:
            if name not in self.rms:
                self.rms[name] = self.w[name].pow(2).mean().sqrt().item()
        clip = self.clip(grads)
        for name, g in grads.items():
            self.move(name, g * clip)

    def clip(self, grads):
        squares = 0.0
        for name, g in grads.items():
            weight = 0.1 if g.numel() == 1 else self.rms[name]
            squares += (g * weight).pow(2).sum().item()
        norm = math.sqrt(squares)
        self.norms.append(norm)
        n = len(self.norms)
        if n in (10, 20, 40):
            self.limit = 2.0 * 2.0 * sorted(self.norms)[n // 2]
        elif n % 100 == 0:
            self.limit = 2.0 * sorted(self.norms[-100:])[50]
        if self.limit is None or norm <= self.limit:
            return 1.0
        self.clipped += 1
        return self.limit / norm

    def move(self, name, g):
        w, b1, b2 = self.w[name], self.b1, self.b2
        self.t[name] += 1
        t = self.t[name]
        self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
        correction = 1 - b2**t
        v = self.v[name] / correction if correction < 0.99 else self.v[name]
        if w.numel() == 1:
            d = -0.1 * self.lr * g / (v.sqrt() + self.eps)
        else:
            self.h[name].append((w * g).sum().item())
            if t % 4 == 0:
                self.rms[name] = w.pow(2).mean().sqrt().item()
            d = -self.lr * g / (v.sqrt() + self.eps) * max(self.rms[name], 1e-5)
            if t % 4 == 0:
                d = d + w * self.scale_change(name, t // 4)
        self.m[name] = b1 * self.m[name] + (1 - b1) * d
        self.w[name] = w + self.m[name]
        if w.numel() == 1:
            self.w[name] = self.w[name].clamp(-10, 10)

    def scale_change(self, name, j):
        last, rms, decay = self.h[name][-4:], self.rms[name], self.b2**4
        self.u[name] = decay * self.u[name] + (1 - decay) * sum(h * h for h in last) / 4
        s = -0.1 * self.lr * math.sqrt(1 - self.b2 ** (4 * j)) * sum(last) / (math.sqrt(self.u[name]) + self.eps)
        if rms < 1e-5:
            return 0.0
        return min(max(-0.1, min(0.1, s)), (3.0 - rms) / rms)


@pytest.mark.parametrize("stack_elements", [2**22, 0], ids=["stacked", "alone"])
@pytest.mark.parametrize("lr", [0.04, 2.0])
def test_scaled_adam_is_its_formulas(stack_elements, lr):
    named = parameters()
    optimizer, plain = ScaledAdam(named.items(), lr, stack_elements=stack_elements), PlainScaledAdam(named, lr)
    for step in range(210):
        run(optimizer, named, [step])
        plain.step(gradients(step))
        if step % 30 == 29:
            for name, p in named.items():
                torch.testing.assert_close(
                    p.detach(), plain.w[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
                )
    assert plain.clipped > 5, "the clipping was never put to work"
    assert any(t != plain.t["matrix"] for t in plain.t.values()), "no gradient was ever absent"


def test_stacked_equals_one_at_a_time():
    together, alone = parameters(), parameters()
    run(ScaledAdam(together.items()), together, range(40))
    run(ScaledAdam(alone.items(), stack_elements=0), alone, range(40))
    for name in SHAPES:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-10, atol=1e-12)


def test_a_stack_is_cut_where_it_would_grow_too_large():
    named = parameters()
    optimizer = ScaledAdam(named.items(), stack_elements=24)
    run(
        optimizer,
        named,
        [0],
        lambda step: {name: torch.ones(shape, dtype=torch.float64) for name, shape in SHAPES.items()},
    )
    assert [len(stack) for stack in optimizer._stacks(list(named.values()))] == [2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", SHAPES)
def test_a_parameter_without_gradient_is_not_touched(name):
    named = parameters()
    optimizer = ScaledAdam(named.items())
    run(optimizer, named, range(6), lambda step: {n: torch.ones_like(p) for n, p in named.items()})
    before, state = named[name].detach().clone(), copy.deepcopy(optimizer.state[named[name]])
    others = {n: p.detach().clone() for n, p in named.items() if n != name}
    run(
        optimizer,
        named,
        range(9),
        lambda step: {n: None if n == name else torch.ones_like(p) for n, p in named.items()},
    )
    assert torch.equal(named[name], before)
    for key, value in optimizer.state[named[name]].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[key])), key
    assert all(not torch.equal(named[n], p) for n, p in others.items())


def test_a_parameter_that_never_had_a_gradient_has_no_state():
    named = parameters()
    optimizer = ScaledAdam(named.items())
    run(
        optimizer,
        named,
        range(3),
        lambda step: {n: None if n == "box" else torch.ones_like(p) for n, p in named.items()},
    )
    assert named["box"] not in optimizer.state
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.param_groups[0]["norm_count"] == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_sets_all_to_zero_and_is_counted(bad):
    named = parameters()
    groups = [{"params": [(n, p)]} for n, p in named.items()]
    optimizer = ScaledAdam(groups)
    run(optimizer, named, range(5), lambda step: {n: torch.ones_like(p) for n, p in named.items()})
    norms = [group["norms"] for group in optimizer.param_groups]
    spoilt = {n: torch.ones_like(p) for n, p in named.items()}
    spoilt["twin"][1, 2] = bad
    run(optimizer, named, [0], lambda step: spoilt)
    assert optimizer.skipped_steps == 1
    assert all(not p.grad.any() for p in named.values()), "a gradient was left standing"
    assert [group["norms"] for group in optimizer.param_groups] == norms, "the bad norm entered the median"
    run(optimizer, named, range(5), lambda step: {n: torch.ones_like(p) for n, p in named.items()})
    assert optimizer.skipped_steps == 1
    assert all(p.isfinite().all() for p in named.values())


def test_gradients_that_were_all_zero_do_not_hold_back_later_ones():
    named = {"w": nn.Parameter(torch.ones(3, dtype=torch.float64))}
    optimizer = ScaledAdam(named.items())
    run(optimizer, named, range(10), lambda step: {"w": torch.zeros(3, dtype=torch.float64)})
    run(optimizer, named, [0], lambda step: {"w": torch.ones(3, dtype=torch.float64)})
    assert (named["w"] < 1.0).all()


def test_a_scalar_stays_within_ten():
    named = {"s": nn.Parameter(torch.tensor(9.99, dtype=torch.float64))}
    run(ScaledAdam(named.items(), 1.0), named, range(60), lambda step: {"s": torch.tensor(-1.0, dtype=torch.float64)})
    assert named["s"].item() == 10.0


def test_the_learned_scale_is_bounded():
    named = {"w": nn.Parameter(torch.full((4,), 2.9, dtype=torch.float64))}
    run(ScaledAdam(named.items(), 0.5), named, range(400), lambda step: {"w": -named["w"].detach().clone()})
    plain = PlainScaledAdam({"w": torch.full((4,), 2.9, dtype=torch.float64)}, 0.5)
    for _ in range(400):
        plain.step({"w": -plain.w["w"]})
    torch.testing.assert_close(named["w"].detach(), plain.w["w"], rtol=1e-6, atol=0.0)


def test_a_tensor_below_the_floor_learns_no_scale():
    tiny = torch.linspace(1e-8, 3e-7, 5, dtype=torch.float64)
    named, plain = {"w": nn.Parameter(tiny.clone())}, PlainScaledAdam({"w": tiny}, 0.03)
    optimizer = ScaledAdam(named.items())
    for _ in range(16):
        grad = plain.w["w"].clone()
        run(optimizer, named, [0], lambda step, g=grad: {"w": g})
        plain.step({"w": grad})
    assert named["w"].square().mean().sqrt() < 1e-5
    torch.testing.assert_close(named["w"].detach(), plain.w["w"], rtol=1e-9, atol=0.0)


def test_a_tensor_of_zeros_can_leave_zero():
    named = {"b": nn.Parameter(torch.zeros(6, dtype=torch.float64))}
    run(ScaledAdam(named.items()), named, range(8), lambda step: {"b": torch.ones(6, dtype=torch.float64)})
    assert (named["b"] < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_dict_continues_bit_for_bit(dtype):
    def grads(step):
        return gradients(step, dtype=dtype)

    whole, halves = parameters(dtype=dtype), parameters(dtype=dtype)
    run(ScaledAdam(whole.items()), whole, range(60), grads)
    first = ScaledAdam(halves.items())
    run(first, halves, range(37), grads)
    second = ScaledAdam(halves.items(), lr=99.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, halves, range(37, 60), grads)
    for name in SHAPES:
        assert torch.equal(whole[name], halves[name]), name


def test_state_is_plain_and_groups_know_their_names():
    named = parameters()
    optimizer = ScaledAdam(named.items())
    run(optimizer, named, range(12))
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == list(SHAPES)
    for entry in state["state"].values():
        assert all(type(value) in (torch.Tensor, int, float) for value in entry.values())
    options = {key: value for key, value in state["param_groups"][0].items() if key not in ("params", "param_names")}
    for key, value in options.items():
        parts = value if isinstance(value, tuple) else (value,)
        assert all(part is None or type(part) in (int, float) for part in parts), key


def test_unclipped_when_told_so():
    named = parameters()
    optimizer = ScaledAdam(named.items(), clipping_scale=None)
    run(optimizer, named, range(12))
    assert optimizer.param_groups[0]["norms"] == ()


def test_it_learns_and_runs_a_closure():
    named = {"w": nn.Parameter(torch.tensor([[0.5, -0.5]]))}
    optimizer = ScaledAdam(named.items(), 0.05)

    def closure():
        optimizer.zero_grad()
        loss = (named["w"] - torch.tensor([[0.7, 0.1]])).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(150)]
    assert losses[-1] < losses[0] / 50


def test_what_it_cannot_step_is_refused():
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    half.grad = torch.ones_like(half)
    with pytest.raises(UsageError, match=r"float32 and float64, but a parameter is torch\.bfloat16; use autocast"):
        ScaledAdam([half]).step()
    rows = nn.Embedding(4, 3, sparse=True)
    rows(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match=r"shape \(4, 3\) has a sparse gradient"):
        ScaledAdam(rows.parameters()).step()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.bias_u = nn.Parameter(torch.zeros(2, 2))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_adamw_decays_matrices_only():
    model = Small()
    optimizer = build_optimizer(model.named_parameters(), "adamw", 1e-3, 0.1, (0.9, 0.98), 1e-8)
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    assert decays == {"linear.weight": 0.1, "linear.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0, "bias_u": 0.0}
    assert {(g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups} == {(1e-3, (0.9, 0.98), 1e-8)}


def test_scaled_adam_is_built_by_name():
    optimizer = build_optimizer(Small().named_parameters(), "scaledadam", 0.045, 0.0, (0.9, 0.98), 1e-8)
    assert isinstance(optimizer, ScaledAdam) and optimizer.param_groups[0]["lr"] == 0.045
    assert "frozen" not in optimizer.param_groups[0]["param_names"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sgd"}, "optimizer must be adamw or scaledadam, but is 'sgd'"),
        ({"name": "scaledadam"}, "weight_decay must be 0 for scaledadam, which learns scales, but is 0.1"),
        ({"lr": -1.0}, "lr must be a finite number of 0 or more, but is -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, but is -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), but are \(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps must be above 0, but is 0.0"),
        ({"model_parameters": []}, "there is nothing to train"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(change, message):
    settings = {
        "model_parameters": Small().named_parameters(),
        "name": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.1,
        "betas": (0.9, 0.98),
        "eps": 1e-8,
    }
    with pytest.raises(UsageError, match=message):
        build_optimizer(**(settings | change))


def test_clipping_scale_must_be_positive():
    with pytest.raises(UsageError, match="clipping_scale must be above 0, but is 0.0; None turns clipping off"):
        ScaledAdam([nn.Parameter(torch.ones(2))], clipping_scale=0.0)
