"""What nothing dominates, by the definition, and the searches for it."""

from __future__ import annotations

import random

import pytest
import torch

from prunekit.errors import ConfigError
from prunekit.selection.subnets import Subnets
from prunekit.solvers.pareto import check_search, front, hypervolume, searched
from prunekit.types import Group


def dominates(a, b):
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def test_the_front_is_what_no_other_point_dominates():
    draw = random.Random(0)
    points = [(draw.randrange(12), draw.randrange(12)) for _ in range(60)]
    plain = {p for p in points if not any(dominates(q, p) for q in points)}
    found = [points[i] for i in front(points)]
    assert set(found) == plain
    assert len(found) == len(plain)


def test_the_hypervolume_is_the_share_of_a_grid_that_is_dominated():
    draw = random.Random(1)
    points = [(draw.randrange(1, 12), draw.randrange(1, 12)) for _ in range(8)]
    cells = [(x, y) for x in range(10) for y in range(10)]
    plain = sum(any(p[0] <= x and p[1] <= y for p in points) for x, y in cells)
    assert hypervolume(points, (10, 10)) == plain
    assert hypervolume([], (10, 10)) == 0


def space(extent="medium", units=(4, 6)):
    groups = [Group(f"g{i}", "neurons", i, n) for i, n in enumerate(units)]
    order = {g.name: torch.arange(g.units) for g in groups}
    return Subnets(groups, extent, order, levels=3)


@pytest.mark.parametrize("extent", ["small", "medium", "large"])
def test_a_space_has_the_whole_network_and_one_unit_of_each_group(extent):
    of = space(extent)
    assert all(mask.all() for mask in of.kept(of.whole).values())
    assert [int(mask.sum()) for mask in of.kept(of.smallest).values()] == [1, 1]
    third = of.kept(of.even(1 / 3))
    assert [int((~third[name]).sum()) for name in ("g0", "g1")] == [1, 2]
    assert not third["g0"][0]  # the first in the order
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        drawn = of.draw(generator)
        other = of.neighbour(drawn, generator)
        assert sum(a != b for a, b in zip(drawn, other, strict=True)) == 1
        for choice in (drawn, other):
            assert all(0 <= c <= most for c, most in zip(choice, of.coordinates, strict=True))
            assert all(mask.any() for mask in of.kept(choice).values())


def test_units_go_in_their_order():
    groups = [Group("g", "neurons", 0, 5)]
    of = Subnets(groups, "small", {"g": torch.tensor([3, 1, 0, 4, 2])}, levels=4)
    assert of.kept((2,))["g"].tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("search", ["random", "stratified", "local", "nsga2"])
def test_a_search_finds_more_than_chance_and_the_same_again(search):
    if search == "nsga2":
        pytest.importorskip("optuna")
    of = space(units=(9,) * 12)
    best = (0, 3, 1) * 4

    def evaluate(choice):
        off = sum(abs(a - b) for a, b in zip(choice, best, strict=True))
        return 1.0 + off, 40.0 - sum(choice)  # off of the best, and what is left

    choices, points = searched(of, evaluate, search, 160, seed=0)
    assert choices[:2] == [of.whole, of.smallest]
    assert len(choices) == len(points) == 160
    assert (choices, points) == searched(of, evaluate, search, 160, seed=0)
    if search in ("local", "nsga2"):
        chance = searched(of, evaluate, "random", 160, seed=0)[1]
        assert hypervolume(points, (40, 41)) > hypervolume(chance, (40, 41))


def test_a_stratified_search_has_all_sizes():
    of = space(units=(9,) * 12)
    sizes = [sum(c) for c in searched(of, lambda c: (0.0, 0.0), "stratified", 42, seed=0)[0][2:]]
    most = sum(of.coordinates)
    for third in range(3):
        part = sizes[len(sizes) * third // 3 : len(sizes) * (third + 1) // 3]
        mean = sum(part) / len(part) / most
        assert abs(mean - (third + 0.5) / 3) < 0.1


def test_without_optuna_nsga2_is_refused(monkeypatch):
    monkeypatch.setattr("prunekit.solvers.pareto.find_spec", lambda name: None)
    check_search("local")
    with pytest.raises(ConfigError, match=r"search=nsga2 needs optuna.*prunekit\[search\]"):
        check_search("nsga2")
