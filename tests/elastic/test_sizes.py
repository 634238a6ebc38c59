"""Sizes by budget, subnet files, and the sandwich."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyvoice.elastic.sampling import Alone, Sandwich
from manyvoice.elastic.search import random_search
from manyvoice.elastic.sizes import Grid, is_nested, layer_order, nested_sizes
from manyvoice.elastic.subnet import Subnet, read_subnet, uniform, whole, write_subnet
from manyvoice.errors import ModelError, UsageError
from manyvoice.models.anatomy import parameter_count
from manyvoice.models.load import build_model


@pytest.fixture(scope="module")
def grid() -> Grid:
    model, family = build_model("tiny", {}, vocabulary=33, blank=32)
    return Grid(model, family)


def test_layers_go_evenly_spread() -> None:
    assert layer_order(1) == [0]
    assert layer_order(6)[:3] == [0, 5, 2]
    for depth in (2, 5, 17):
        order = layer_order(depth)
        assert sorted(order) == list(range(depth)) and order[:2] == [0, depth - 1]
        kept = sorted(order[: depth // 2 + 1])
        assert max(b - a for a, b in zip(kept, kept[1:], strict=False)) <= 3


@settings(max_examples=15, deadline=None)
@given(shares=st.lists(st.integers(12, 100), min_size=2, max_size=5, unique=True))
def test_sizes_are_nested_and_within_budget(grid: Grid, shares: list[int]) -> None:
    budgets = [s / 100 for s in shares]
    try:
        sizes = nested_sizes(grid, budgets)
    except UsageError as error:
        assert "twice" in str(error) or "the name" in str(error)
        return
    for subnet, budget in zip(sizes, sorted(budgets, reverse=True), strict=True):
        assert 0.4 * budget < grid.share(subnet) <= budget * (1 + 1e-6)
    assert all(small in large for large, small in zip(sizes, sizes[1:], strict=False))


def test_the_default_sizes_of_a_laptop_s_model(grid: Grid) -> None:
    sizes = nested_sizes(grid, [1.0, 0.75, 0.55, 0.4, 0.25])
    assert [s.name for s in sizes] == ["100", "75", "55", "40", "25"]
    assert sizes[0].kept == whole(grid.anatomy).kept
    assert grid.costs(sizes[0]).parameters == parameter_count(grid.model)


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9, 1.0, 7.0])
def test_random_search_reaches_every_budget(grid: Grid, budget: float) -> None:
    """Of other depths and widths, near the budget, and the best comes first."""
    shares: list[float] = []

    def score(subnet: Subnet) -> float:
        shares.append(grid.share(subnet))
        return -shares[-1]

    found = random_search(grid, budget, score, tries=6)
    most = min(budget, 1.0)
    assert len(found) == len(shares) == 6 and len({f.subnet.kept for f in found}) == 6
    assert all(0.9 * most <= f.taken <= most * (1 + 1e-6) for f in found)
    assert found[0].score == -max(shares)
    assert budget > 0.5 or len({f.subnet.layers(grid.anatomy) for f in found}) > 1
    with pytest.raises(UsageError, match="search: found no subnet that takes"):
        random_search(grid, 1e-4, score, tries=2)


def test_a_size_beside_others_is_nested_if_it_can_be(grid: Grid) -> None:
    sizes = nested_sizes(grid, [1.0, 0.75, 0.55, 0.4, 0.25])
    count = {True: 0, False: 0}
    for percent in range(20, 100, 4):
        (between,) = nested_sizes(grid, [percent / 100], beside=sizes)
        (free,) = nested_sizes(grid, [percent / 100])
        count[is_nested(between, sizes)] += 1
        assert grid.share(between) >= 0.6 * percent / 100
        assert is_nested(between, sizes) or between.kept == free.kept
    assert count[True] > 15, count


def test_budgets_in_parameters(grid: Grid) -> None:
    most = grid.costs(whole(grid.anatomy)).parameters
    sizes = nested_sizes(grid, [most, most / 2], lambda s: grid.costs(s).parameters)
    assert most / 4 < grid.costs(sizes[1]).parameters <= most / 2


def test_budgets_that_cannot_be_are_refused(grid: Grid) -> None:
    with pytest.raises(UsageError, match=r"a budget of 0\.001 is below the smallest subnet, which takes 0\.0"):
        nested_sizes(grid, [1.0, 0.001])
    with pytest.raises(UsageError, match="give one subnet twice"):
        nested_sizes(grid, [1.0, 0.5, grid.share(nested_sizes(grid, [1.0, 0.5])[1])])


def test_near_budgets_have_names_of_their_own(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [s.name for s in nested_sizes(grid, [1.0, 0.55, 0.161, 0.125])] == ["100", "55", "16.1", "12.5"]
    monkeypatch.setattr("manyvoice.elastic.sizes._name", lambda share: "50")
    with pytest.raises(UsageError, match="give two sizes the name 50"):
        nested_sizes(grid, [1.0, 0.5])


def test_a_subnet_file_is_readable_and_checked(grid: Grid, tmp_path: Path) -> None:
    subnet = uniform(grid.anatomy, "mine", [0, 5], {"head": 2, "ff_chunk": 3})
    path = tmp_path / "mine.json"
    write_subnet(path, subnet, supernet="abc", more={"parameters": 7})
    again, document = read_subnet(path, grid.anatomy, supernet="abc")
    assert again == subnet and document["parameters"] == 7
    expected = ["conv", *(f"ff1.{k}" for k in range(3)), *(f"ff2.{k}" for k in range(3)), "head.0", "head.1"]
    assert document["layers"]["5"] == expected
    with pytest.raises(ModelError, match="is a subnet of the model abc, but this one is def"):
        read_subnet(path, grid.anatomy, supernet="def")
    small, family = build_model("tiny", {"num_hidden_layers": 2}, vocabulary=33, blank=32)
    with pytest.raises(ModelError, match=r"keeps layers\.5.*which this model does not have; it has 2 layers"):
        read_subnet(path, family.anatomy(small))
    for text in ("{", "[]", json.dumps({"format": 1}), json.dumps(document | {"layers": 3})):
        path.write_text(text)
        with pytest.raises(ModelError, match="is no subnet file"):
            read_subnet(path, grid.anatomy)
    path.write_text(json.dumps(document | {"format": 9}))
    with pytest.raises(ModelError, match="format 9, but this version reads 1"):
        read_subnet(path, grid.anatomy)


def test_the_sandwich_is_a_function_of_seed_and_step(grid: Grid) -> None:
    sizes = nested_sizes(grid, [1.0, 0.7, 0.5, 0.25])
    one, two = (Sandwich(sizes, seed=3, grid=grid, others=1, named=0.5) for _ in range(2))
    assert [one.draw(s) for s in range(40)] == [two.draw(s) for s in range(40)]
    drawn = [one.draw(s) for s in range(200)]
    assert all(d[0].subnet == sizes[0] and len(d) == 2 for d in drawn)
    assert all(d[1].subnet == sizes[-1] for d in drawn[::2])
    others = [d[1].subnet for d in drawn[1::2]]
    assert all(s in sizes[0] and sizes[-1] in s for s in others)
    assert {s.name for s in others} == {"70", "50", "random"}
    full = Sandwich(sizes, seed=3, others=3, grid=None).draw(7)
    assert [d.role for d in full] == ["largest", "other", "other", "smallest"]
    alone = [Alone(sizes, seed=0).draw(s) for s in range(100)]
    assert {d[0].subnet.name for d in alone} == {"100", "70", "50", "25"} and all(len(d) == 1 for d in alone)


def test_a_sandwich_wants_nested_sizes(grid: Grid) -> None:
    sizes = nested_sizes(grid, [1.0, 0.5])
    for wrong in (sizes[:1], sizes[::-1], [sizes[0], Subnet(name="x", kept=frozenset({"y"}))]):
        with pytest.raises(UsageError, match="two or more nested sizes, largest first"):
            Sandwich(wrong, seed=0)
