"""OWL's shares: the papers' formula, the total, and what it comes to without outliers."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import problem, uniform
from reference import inputs_of
from tiny_models import tiny_model

from prunekit.architecture.matrices import matrices, matrix, module_name
from prunekit.ratios.owl import outliers, shares
from prunekit.registry import pruners


@pytest.fixture
def llama():
    return tiny_model("llama", layers=3)


def prune(model, tokens, ratio):
    pruner = pruners.build({"name": "unstructured"})
    return pruner(problem(model, tokens, criterion={"name": "wanda"}, ratio=ratio))


def test_shares_fall_with_outliers_and_keep_their_mean():
    found = [1.0, 3.0, 2.0, 7.0]
    s = shares(found, [10] * 4, 0.7, 0.08)
    assert sum(s) / 4 == pytest.approx(0.7, abs=1e-9)
    assert max(s) - min(s) == pytest.approx(0.16, abs=1e-9)
    assert sorted(range(4), key=s.__getitem__) == sorted(
        range(4), key=found.__getitem__, reverse=True
    )
    assert shares([2.0, 2.0], [1, 1], 0.3, 0.1) == [0.3, 0.3]
    cut = shares(found, [10, 20, 30, 40], 0.05, 0.2)
    assert min(cut) == 0
    assert sum(a * b for a, b in zip(cut, [10, 20, 30, 40])) == pytest.approx(5)


@pytest.mark.parametrize("factor", [2, 3.5, 5])
def test_outliers_are_the_scores_above_so_many_means_of_the_block(llama, tokens, factor):
    groups = matrices(llama)
    x = inputs_of(llama, tokens, [module_name(g) for g in groups])
    for layer, found in enumerate(outliers(problem(llama, tokens), [0, 1, 2], factor)):
        inside = [g for g in groups if g.layer == layer]
        scores = torch.cat(
            [(matrix(llama, g).abs() * x[module_name(g)].norm(dim=0)).flatten() for g in inside]
        )
        assert found == pytest.approx(100 * float((scores > factor * scores.mean()).float().mean()))


def test_owl_without_spread_is_uniform(llama, tokens):
    twin = copy.deepcopy(llama)
    a = prune(llama, tokens, {"name": "owl", "lamda": 0.0})
    b = prune(twin, tokens, uniform(0.5))
    assert a.notes == b.notes
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in llama.state_dict().items())


def test_owl_keeps_the_total(llama, tokens):
    groups = matrices(llama)
    owl = {"name": "owl", "target": 0.7, "M": 2}
    counts = problem(llama, tokens, ratio=owl).allocate(groups).counts
    by_layer = [
        sum(counts[g.name] for g in groups if g.layer == i)
        / sum(g.units for g in groups if g.layer == i)
        for i in range(3)
    ]
    assert sum(counts.values()) == int(0.7 * sum(g.units for g in groups))
    assert sum(by_layer) / 3 == pytest.approx(0.7, abs=1e-3)
    assert max(by_layer) - min(by_layer) == pytest.approx(0.16, abs=2e-3)


def test_owl_keeps_the_total_of_small_groups(llama, tokens):
    """Heads by twos: rounding each of them down would leave them all."""
    asked = problem(llama, tokens, ratio={"name": "owl", "target": 0.4})
    groups = asked.groups(["heads", "neurons"])
    counts = asked.allocate(groups).counts
    assert sum(counts.values()) == int(0.4 * sum(g.units for g in groups))
    assert any(counts[g.name] for g in groups if g.kind == "heads")
