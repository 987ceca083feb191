"""Ratios that choose among local solutions, on solutions whose best choice is known."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from problems import problem
from tiny_models import tiny_model
from torch import nn

from prunekit.errors import ConfigError
from prunekit.ratios.evolution import survivor
from prunekit.ratios.predictor import held_out_tau
from prunekit.registry import pruners, ratios
from prunekit.types import Group, Member, SubLayer

UNITS, PARTS = 16, 6
SMALL = {"window": 8, "tokens": 64}
SEARCHES = {
    "evolution": {"generations": 12, "offspring": 8, "window": 8, "tokens": [16, 64]},
    "predictor": {"samples": 24, "rounds": 4, "verified": 4, **SMALL},
    "random": {"samples": 8, **SMALL},
}


class Toy(nn.Module):
    """Logits that move away from the dense ones as `harm` grows, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        for i in range(PARTS):
            self.register_parameter(f"part{i}", nn.Parameter(torch.zeros(UNITS, 5 + i % 2)))
        self.logits = nn.Parameter(torch.randn(32, 32, generator=rng) * 2)
        self.noise = torch.randn(32, 32, generator=rng)
        self.harm = 0.0

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=(self.logits + self.harm * self.noise)[input_ids])


class Solutions:
    """Levels of a quarter of the units each. A choice harms by what `harms[i][level]` add up to;
    `errors` are what the local ones pretend.
    """

    key = ("toy",)

    def __init__(self, model, groups, harms, errors=None) -> None:
        self.model, self.harms, self.reads = model, harms, 0
        removed = tuple(range(0, UNITS + 1, UNITS // 4))
        self.sublayers = [
            SubLayer(g, removed, tuple(e), float)
            for g, e in zip(groups, errors or harms, strict=True)
        ]

    def most(self, group):
        return group.units

    @contextmanager
    def assembled(self) -> Iterator:
        def put(levels: Sequence[int]) -> None:
            self.model.harm = sum(h[n] for h, n in zip(self.harms, levels, strict=True))
            self.reads += 1

        try:
            yield put
        finally:
            self.model.harm = 0.0


def toy(errors=None, seed=3):
    """A problem, its groups and the harms of its levels."""
    model = Toy()
    index = torch.arange(UNITS)[:, None]
    groups = [
        Group(f"neurons.{i}", "neurons", i, UNITS, (Member(f"part{i}", 0, index),))
        for i in range(PARTS)
    ]
    steps = torch.rand(PARTS, 4, generator=torch.Generator().manual_seed(seed))
    harms = [[0.0, *row.cumsum(0).tolist()] for row in steps]
    text = torch.randint(0, 32, (16, 16), generator=torch.Generator().manual_seed(1))
    found = Solutions(model, groups, harms, errors)
    return dataclasses.replace(problem(model, text), solutions=found), groups, harms


def allocate(name, asked, groups, **options):
    given = {"target": 0.5, "of": "prunable", **SEARCHES.get(name, {}), **options}
    return ratios.build({"name": name, **given})(asked, groups)


def harm_of(found, harms):
    levels = [found.notes["levels"][f"neurons.{i}"] // (UNITS // 4) for i in range(PARTS)]
    return sum(h[n] for h, n in zip(harms, levels, strict=True))


def best_harm(groups, harms):
    """Of all choices that save half but for a step."""
    sizes = [5 + i % 2 for i in range(PARTS)]
    total = sum(sizes) * UNITS
    savings = {
        c: sum(n * 4 * s for n, s in zip(c, sizes))
        for c in itertools.product(range(5), repeat=PARTS)
    }
    fitting = [c for c, s in savings.items() if total / 2 - 4 * min(sizes) < s <= total / 2]
    return min(sum(h[n] for h, n in zip(harms, c)) for c in fitting)


@pytest.mark.parametrize("name", ["milp", *SEARCHES])
def test_the_budget_is_met_to_a_unit(name):
    asked, groups, _ = toy()
    for target in (0.0, 0.13, 0.5, 0.97):
        found = allocate(name, asked, groups, target=target)
        assert found.ranking == "local"
        saved = sum(n * (5 + i % 2) for i, n in enumerate(found.counts.values()))
        total = sum((5 + i % 2) * UNITS for i in range(PARTS))
        assert 0 <= target * total - saved < 6 or all(n >= UNITS - 1 for n in found.counts.values())
        told = found.notes["budget"]
        assert told["predicted"] == told["dense"] - saved == total - saved


def test_the_programme_takes_the_least_sum_of_errors():
    asked, groups, harms = toy()
    found = allocate("milp", asked, groups)
    assert harm_of(found, harms) == pytest.approx(best_harm(groups, harms))
    assert asked.solutions.reads == 0
    shares, errors = zip(*found.notes["front"])
    assert list(shares) == sorted(shares)
    assert list(errors) == sorted(errors)


def test_evolution_finds_a_planted_optimum_where_local_errors_mislead():
    """It saves all of the budget but for less than a step, and harms nothing."""
    planted = (4, 0, 3, 1, 2, 2)
    asked, groups, harms = toy()
    for i, best in enumerate(planted):
        harms[i][:] = [0.3 * abs(level - best) for level in range(5)]  # the solutions' own too
    start = allocate("milp", asked, groups)
    assert start.notes["levels"] != {f"neurons.{i}": 4 * n for i, n in enumerate(planted)}
    found = allocate("evolution", asked, groups, generations=40)
    assert found.notes["levels"] == {f"neurons.{i}": 4 * n for i, n in enumerate(planted)}
    tokens, values = zip(*found.notes["trace"])
    assert list(values) == sorted(values, reverse=True)
    assert values[-1] < 1e-5 < values[0]
    assert list(tokens) == sorted(tokens)
    assert asked.model.harm == 0


def test_evolution_begins_with_equal_shares_where_these_are_nearer():
    """What harms is to be away from them; local errors say otherwise."""
    asked, groups, harms = toy()
    levels = {}
    for i, row in enumerate(harms):
        row[:] = [0.3 * abs(level - 2) for level in range(5)]
        levels[f"neurons.{i}"] = 8
    start = allocate("milp", asked, groups)
    assert start.notes["levels"] != levels
    found = allocate("evolution", asked, groups, generations=1, offspring=1)
    assert found.notes["levels"] == levels
    assert found.notes["trace"][0][1] < 1e-5


@pytest.mark.parametrize("goal", ["kl", "acceptance", "perplexity"])
def test_every_goal_is_better_where_nothing_is_harmed(goal):
    asked, groups, _ = toy()
    found = allocate("random", asked, groups, goal=goal, samples=12)
    values = found.notes["sampled"]
    assert found.notes["fitness"] == min(values)
    few = allocate("random", asked, groups, goal=goal, samples=12, target=0.1)
    assert few.notes["fitness"] < found.notes["fitness"]


def test_few_tokens_sort_out_what_more_tokens_decide():
    """The best quarter by few tokens goes on; of these and the parent more tokens choose."""
    seen = []

    def fitness(choices, tokens):
        seen.append((tokens, choices))
        return [c[0] if tokens == 8 else -c[0] for c in choices]

    children = [(n,) for n in range(11, -1, -1)]
    assert survivor(fitness, (5,), children, [8, 32]) == ((5,), -5)
    assert seen[0] == (8, [(5,), *(c for c in children if c != (5,))])
    assert seen[1] == (32, [(5,), (0,), (1,)])


def test_tau_is_told_of_samples_that_the_trees_did_not_see():
    """Nothing can be learned from noise, but by heart."""
    rng = np.random.default_rng(0)
    menu = SimpleNamespace(error=lambda choice: 1.0)
    parts = [SimpleNamespace(group=SimpleNamespace(units=100)) for _ in range(4)]
    levels = SimpleNamespace(sublayers=parts, menu=menu, counts=lambda c: dict(enumerate(c)))
    choices = [tuple(int(n) for n in rng.integers(100, size=4)) for _ in range(80)]
    assert held_out_tau(levels, choices, rng.random(80).tolist(), 0, rng) < 0.5


def test_trees_learn_a_sum_and_what_they_choose_is_measured():
    asked, groups, harms = toy()
    found = allocate("predictor", asked, groups, samples=80)
    assert found.notes["tau"] > 0.5
    assert len(found.notes["sampled"]) == 80
    assert found.notes["fitness"] <= min(found.notes["sampled"])
    control = allocate("random", asked, groups, samples=88)
    assert harm_of(found, harms) <= harm_of(control, harms)
    for predicted, measured in found.notes["verified"]:
        assert predicted == pytest.approx(measured, abs=1.0)


def test_without_rounds_the_best_of_the_samples_is_taken():
    asked, groups, _ = toy()
    found = allocate("predictor", asked, groups, rounds=0)
    assert found.notes["fitness"] == min(found.notes["sampled"])
    assert found.notes["verified"] == []


@pytest.mark.parametrize("name", SEARCHES)
def test_seeds_repeat_and_differ(name):
    found = []
    for seed in (0, 0, 1):
        asked, groups, _ = toy()
        found.append(allocate(name, asked, groups, seed=seed))
    assert found[0].counts == found[1].counts
    assert found[0].notes == found[1].notes
    assert found[0].notes != found[2].notes


def remembering(asked):
    """The problem with a cache, and what is in it."""
    kept = {}

    def remember(module, name, parts, compute):
        assert module == "prunekit.ratios.level_search"
        key = (name, repr(parts))
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    return dataclasses.replace(asked, remember=remember), kept


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_that_was_cut_off_measures_what_is_missing(name):
    asked, groups, _ = toy()
    asked, kept = remembering(asked)
    whole = allocate(name, asked, groups)
    reads = asked.solutions.reads
    for key in list(kept)[len(kept) // 2 :]:
        del kept[key]
    again = allocate(name, asked, groups)
    assert again.notes == whole.notes
    assert 0 < asked.solutions.reads - reads < reads


def test_what_was_measured_of_other_solutions_does_not_count():
    """The same options, and other errors: another version of a solver made them."""
    asked, groups, harms = toy()
    asked, _ = remembering(asked)
    allocate("random", asked, groups)
    reads = asked.solutions.reads
    allocate("random", asked, groups)
    assert asked.solutions.reads == reads
    errors = [[2 * e for e in row] for row in harms]
    other = dataclasses.replace(asked, solutions=Solutions(asked.model, groups, harms, errors))
    allocate("random", other, groups)
    assert other.solutions.reads > 0


def test_what_cannot_be_is_said():
    asked, groups, _ = toy()
    bare = dataclasses.replace(asked, solutions=None)
    with pytest.raises(ConfigError, match="pruner=database"):
        allocate("milp", bare, groups)
    with pytest.raises(ConfigError, match="cannot be removed from 6 groups"):
        allocate("milp", asked, groups, target=0.9, of="model")
    with pytest.raises(ConfigError, match="prompt must be greater than 0"):
        allocate("milp", asked, groups, request={"prompt": 0})
    with pytest.raises(ConfigError, match="no 'promt'; possible: batch, prompt"):
        allocate("milp", asked, groups, request={"promt": 9})
    with pytest.raises(ConfigError, match="calibration samples have 16"):
        allocate("evolution", asked, groups, window=17)
    with pytest.raises(ConfigError, match="the calibration text has 256 tokens"):
        allocate("random", asked, groups, tokens=257)


def test_shapes_alone_do_not_tell_the_counts():
    model = tiny_model("llama", meta=True)
    asked = problem(model, ratio={"name": "milp", "target": 0.2})
    pruner = pruners.build({"name": "database"})
    assert pruner.meta["check"](asked, **pruner.options).counts is None
    over = problem(model, ratio={"name": "milp", "target": 0.99})
    with pytest.raises(ConfigError, match="cannot be removed"):
        pruner.meta["check"](over, **pruner.options)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_on_a_real_database(arch):
    """The same parameters: what is measured is what was predicted."""
    text = torch.randint(8, 100, (16, 32), generator=torch.Generator().manual_seed(0))
    sizes = set()
    for name in ("milp", "evolution"):
        model = tiny_model(arch)
        node = {"name": name, "target": 0.25, "of": "prunable"}
        if name == "evolution":
            node |= {"generations": 2, "offspring": 4, "tokens": [32, 64], "window": 32}
        asked = problem(model, text, ratio=node)
        pruner = pruners.build({"name": "database", "precision": "model", "levels": 4})
        told = pruner(asked).notes["budget"]
        assert told["measured"] == pytest.approx(told["predicted"], abs=300)  # biases are new
        sizes.add(round(told["predicted"]))
        assert torch.isfinite(model(text).logits).all()
    assert max(sizes) - min(sizes) < 3 * 64


def test_milliseconds_are_predicted_and_measured():
    text = torch.randint(8, 100, (16, 32), generator=torch.Generator().manual_seed(0))
    request = {"prompt": 8, "new_tokens": 2, "repeats": 1}
    node = {"name": "milp", "target": 0.05, "of": "latency_ms", "request": request}
    asked = problem(tiny_model("llama"), text, ratio=node)
    out = pruners.build({"name": "database", "precision": "model", "levels": 4})(asked)
    told = out.notes["budget"]
    assert told["of"] == "latency_ms"
    assert 0 < told["predicted"] <= told["dense"]
    assert told["measured"] > 0
