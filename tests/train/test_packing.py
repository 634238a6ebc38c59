from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from manyvoice.errors import CheckpointError, UsageError
from manyvoice.train.checkpoint import load, save
from manyvoice.train.optim import ScaledAdam, build_optimizer
from manyvoice.train.packing import pack_optimizer, pack_random, unpack_optimizer, unpack_random


def model(width=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, 2))


def build(net, name="scaledadam"):
    decay = 0.01 if name == "adamw" else 0.0
    return build_optimizer(net.named_parameters(), name, 0.02, decay, (0.9, 0.98), 1e-8)


def train(net, optimizer, steps):
    for step in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().sum().backward()
        if step % 3:
            net[3].bias.grad = None  # left out of this step
        optimizer.step()


def plain_sgd(net):
    return torch.optim.SGD(list(net.named_parameters()), lr=0.01, momentum=0.9)


def amsgrad(net):
    return torch.optim.AdamW(list(net.named_parameters()), lr=torch.tensor(0.01), amsgrad=True)


BUILDERS = {"scaledadam": build, "adamw": lambda net: build(net, "adamw"), "sgd": plain_sgd, "amsgrad": amsgrad}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_packed_optimiser_continues_bit_for_bit_through_the_disk(tmp_path, name):
    whole, first = model(), model()
    train(whole, BUILDERS[name](whole), range(45))
    optimizer = BUILDERS[name](first)
    train(first, optimizer, range(23))
    tensors, state = pack_optimizer(optimizer)
    save(tmp_path / "a", tensors={"model": first.state_dict(), "optimizer": tensors}, state={"optimizer": state})

    loaded, second = load(tmp_path / "a"), model()
    second.load_state_dict(loaded.tensors["model"])
    resumed = BUILDERS[name](second)
    unpack_optimizer(resumed, loaded.tensors["optimizer"], loaded.state["optimizer"])
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    train(second, resumed, range(23, 45))
    for key, x in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], x), key


def test_unpacked_state_is_a_copy():
    net = model()
    optimizer = build(net)
    train(net, optimizer, range(3))
    tensors, state = pack_optimizer(optimizer)
    before = {key: x.clone() for key, x in tensors.items()}
    other = model()
    resumed = build(other)
    unpack_optimizer(resumed, tensors, state)
    train(other, resumed, range(3))
    assert all(torch.equal(x, before[key]) for key, x in tensors.items())


def test_an_optimiser_that_has_not_stepped_is_packed_too():
    net = model()
    tensors, state = pack_optimizer(build(net))
    assert tensors == {}
    fresh = build(net)
    unpack_optimizer(fresh, tensors, json.loads(json.dumps(state)))
    assert not fresh.state


def test_the_order_of_parameters_may_change():
    net, again = model(), model()
    optimizer = build(net)
    train(net, optimizer, range(5))
    turned = build_optimizer(reversed(list(again.named_parameters())), "scaledadam", 0.02, 0.0, (0.9, 0.98), 1e-8)
    unpack_optimizer(turned, *pack_optimizer(optimizer))
    for (name, p), q in zip(net.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["momentum"], turned.state[q]["momentum"]), name


def test_names_may_be_given_to_an_optimiser_that_has_none():
    net = model()
    optimizer = ScaledAdam(net.parameters())
    train(net, optimizer, range(2))
    with pytest.raises(UsageError, match=r"built without names; pass names=model\.named_parameters\(\)"):
        pack_optimizer(optimizer)
    with pytest.raises(UsageError, match=r"a parameter of shape \(3,\) has no name"):
        pack_optimizer(optimizer, [("0.weight", net[0].weight)])
    tensors, state = pack_optimizer(optimizer, net.named_parameters())
    assert "state/momentum/0.weight" in tensors
    named = build(net)
    state["groups"][0]["options"]["lr"] = 0.5
    unpack_optimizer(named, tensors, state)
    assert named.param_groups[0]["lr"] == 0.5 and named.state[net[0].weight]["step"] == 2


def test_state_kept_in_another_type_than_its_parameter_stays_so():
    net = model().bfloat16()
    optimizer = plain_sgd(net)
    for p in net.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.full(p.shape, 1 / 3)
    fresh = plain_sgd(net)
    unpack_optimizer(fresh, *pack_optimizer(optimizer))
    for p in net.parameters():
        assert torch.equal(fresh.state[p]["momentum_buffer"], torch.full(p.shape, 1 / 3))


def test_what_does_not_fit_is_refused_by_name():
    net = model()
    optimizer = build(net)
    train(net, optimizer, range(2))
    tensors, state = pack_optimizer(optimizer)
    with pytest.raises(CheckpointError, match="the state is of ScaledAdam, but this run steps with AdamW; resume with"):
        unpack_optimizer(build(net, "adamw"), tensors, state)
    with pytest.raises(CheckpointError, match=r"parameter '0\.weight' is \(5, 4\) now, but was \(3, 4\)"):
        unpack_optimizer(build(model(5)), tensors, state)
    with pytest.raises(CheckpointError, match=r"group 0: parameter '4\.bias' is new \(2 differ\)"):
        unpack_optimizer(build(model().append(nn.Linear(2, 2))), tensors, state)
    with pytest.raises(CheckpointError, match=r"group 0: parameter '3\.bias' is gone \(2 differ\)"):
        unpack_optimizer(build(model()[:3]), tensors, state)
    with pytest.raises(CheckpointError, match="had 1 groups, but has 2 now"):
        unpack_optimizer(ScaledAdam([{"params": [n_p]} for n_p in list(net.named_parameters())[:2]]), tensors, state)
    for stray in ("state/momentum/9.weight", "group/7/lr", "something"):
        with pytest.raises(CheckpointError, match=f"optimiser tensor '{stray}' belongs to no parameter of this run"):
            unpack_optimizer(build(net), tensors | {stray: torch.ones(1)}, state)
    with pytest.raises(CheckpointError, match="is not what pack_optimizer writes: KeyError"):
        unpack_optimizer(build(net), tensors, {"class": "ScaledAdam"})


def test_state_that_is_neither_tensor_nor_number_is_refused():
    net = model()
    optimizer = build(net)
    optimizer.state[net[0].weight]["hook"] = print
    with pytest.raises(CheckpointError, match=r"state 'hook' of '0\.weight' of the optimiser is a builtin_function"):
        pack_optimizer(optimizer)


def draw():
    numbers = [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]
    return [*numbers, *torch.rand(3).tolist(), *torch.randn(17).tolist()]


@pytest.mark.parametrize("warmed", [0, 1, 3])
def test_random_numbers_go_on_where_they_were(tmp_path, warmed):
    for _ in range(warmed):
        draw()  # leaves half of a pair of normal numbers waiting
    tensors, state = pack_random()
    save(tmp_path / "a", tensors={"random": tensors}, state={"random": state})
    expected = [draw() for _ in range(3)]
    for seeder in (random.seed, np.random.seed, torch.manual_seed):
        seeder(99)
    loaded = load(tmp_path / "a")
    unpack_random(loaded.tensors["random"], loaded.state["random"])
    assert [draw() for _ in range(3)] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_numbers_of_a_cuda_device_go_on_too():
    torch.rand(2, device="cuda")
    tensors, state = pack_random()
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed_all(5)
    unpack_random(tensors, state)
    assert torch.equal(torch.rand(4, device="cuda"), expected)


def test_a_malformed_random_state_is_refused():
    tensors, state = pack_random()
    for key in ("torch", "numpy", "python"):
        with pytest.raises(CheckpointError, match=f"is not what pack_random writes: KeyError.*{key}"):
            unpack_random({k: x for k, x in tensors.items() if k != key}, state)
    with pytest.raises(CheckpointError, match="is not what pack_random writes"):
        unpack_random(tensors | {"torch": torch.zeros(3, dtype=torch.uint8)}, state)
    with pytest.raises(CheckpointError, match="is not what pack_random writes"):
        unpack_random(tensors | {"python": torch.zeros(3, dtype=torch.int64)}, state)
