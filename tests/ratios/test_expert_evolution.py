"""Counts of experts by search: the total, the bounds, the fitness against models that really lack
the experts.
"""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from problems import problem, uniform
from tiny_models import tiny_model

from prunekit import graph
from prunekit.errors import ConfigError, NeedsData
from prunekit.ratios.expert_evolution import moved_counts
from prunekit.registry import criteria, pruners, ratios

TOKENS = torch.randint(8, 100, (6, 16), generator=torch.Generator().manual_seed(0))
OPTIONS = {"name": "expert_evolution", "target": 0.4, "tokens": 96, "window": 16}


@pytest.fixture(scope="module")
def mixtral():
    return tiny_model("mixtral")


def groups_of(model):
    return [g for g in graph.discover(model) if g.kind == "experts"]


def allocation(model, **options):
    asked = problem(model, TOKENS, criterion={"name": "experts"})
    return ratios.build(OPTIONS | options)(asked, groups_of(model))


def refused(dense, lost, scores):
    """1 - sum of min(p, q) over the text, with the lowest experts really removed."""
    kept = {}
    for name, n in lost.items():
        kept[name] = torch.ones(5, dtype=torch.bool)
        kept[name][scores[name].argsort(stable=True)[:n]] = False
    pruned = graph.remove(copy.deepcopy(dense), kept)
    with torch.no_grad():
        p, q = (m(TOKENS).logits[:, :-1].softmax(-1) for m in (dense, pruned))
    return 1 - float(torch.minimum(p, q).sum(-1).mean())


def test_the_counts_found_are_the_best_of_all_for_the_model_without_the_experts(mixtral):
    found = allocation(mixtral, generations=6, population=8)
    run = problem(mixtral, TOKENS).run()
    scores = criteria.build({"name": "experts"})(mixtral, groups_of(mixtral), run)
    every = {
        lost: refused(mixtral, {f"experts.{i}": n for i, n in enumerate(lost)}, scores)
        for lost in itertools.product(range(4), repeat=2)
        if sum(lost) == 4
    }
    notes = found.notes["expert_evolution"]
    assert notes["uniform"] == pytest.approx(every[2, 2], rel=1e-3)
    assert notes["found"] == pytest.approx(min(every.values()), rel=1e-3)
    assert tuple(found.counts.values()) == min(every, key=every.get)
    assert notes["trace"] == sorted(notes["trace"], reverse=True)


def test_the_best_have_children_and_routers_keep_what_they_pick(monkeypatch):
    """Experts of the first layer are worth nothing, of which two must stay; of the others' each
    layer's are worth more than those before.
    """

    class Fitness:
        def __init__(self, *_):
            pass

        def __call__(self, choices, tokens):
            return [float(sum(i * n for i, n in enumerate(c))) for c in choices]

    monkeypatch.setattr("prunekit.ratios.expert_evolution.Fitness", Fitness)
    found = allocation(tiny_model("mixtral", 4), generations=40, population=8, parents=2)
    assert list(found.counts.values()) == [3, 3, 2, 0]
    assert found.notes["expert_evolution"]["trace"][-1] == 7


def test_without_generations_every_layer_loses_the_same(mixtral):
    same = ratios.build(uniform(0.4))(problem(mixtral, TOKENS), groups_of(mixtral))
    assert allocation(mixtral, generations=0).counts == same.counts
    assert allocation(mixtral, target=0).counts == {"experts.0": 0, "experts.1": 0}


def test_the_pruner_removes_what_was_found(mixtral):
    model = copy.deepcopy(mixtral)
    ratio = ratios.build(OPTIONS | {"generations": 3})
    asked = problem(model, TOKENS, criterion={"name": "experts"}, ratio=ratio)
    pruned = pruners.build({"name": "oneshot", "kinds": ["experts"]})(asked)
    lost = {name: int((~mask).sum()) for name, mask in pruned.kept.items()}
    assert {name: lost.get(name, 0) for name in pruned.notes["counts"]} == pruned.notes["counts"]
    assert sum(lost.values()) == 4
    assert torch.isfinite(model(TOKENS).logits).all()


def test_children_keep_the_total_and_the_bounds():
    rng = np.random.default_rng(0)
    most = (3, 6, 1, 6)
    child = (2, 2, 1, 3)
    seen = set()
    for _ in range(300):
        before, child = child, moved_counts(child, most, 2, 3, rng)
        assert sum(child) == 8
        assert all(0 <= n <= m for n, m in zip(child, most, strict=True))
        assert sum(max(0, a - b) for a, b in zip(child, before, strict=True)) <= 6
        seen.add(child)
    assert len(seen) > 20


def test_other_units_and_shapes_alone_are_refused(mixtral):
    neurons = [g for g in graph.discover(mixtral) if g.kind == "neurons"]
    ratio = ratios.build(OPTIONS)
    with pytest.raises(ConfigError, match=r"kinds=\[experts\]"):
        ratio(problem(mixtral, TOKENS), neurons)
    with pytest.raises(NeedsData):
        ratio(problem(mixtral), groups_of(mixtral))


def test_a_generation_without_room_for_children_is_refused(mixtral):
    with pytest.raises(ConfigError, match=r"parents=8 leave no room .* at most 7"):
        allocation(mixtral, parents=8, population=8)
