"""Which units stay: exact, stable, never emptying a group."""

from __future__ import annotations

import pytest
import torch
from reference import llama_groups, pooled_by_hand, tiny_llama
from tiny_models import tiny_model

from prunekit.errors import ConfigError
from prunekit.graph import discover, remove
from prunekit.selection.units import (
    choose,
    keep_local,
    keep_nearest,
    keep_pooled,
    whole_sizes,
    without,
)
from prunekit.types import Allocation


def test_lowest_is_exact_and_stable_with_ties():
    assert without(torch.tensor([1.0, 1.0, 1.0, 0.0]), 2).tolist() == [
        False,
        True,
        True,
        False,
    ]
    assert without(torch.zeros(5), 0).all()


def test_local_never_empties():
    kept = keep_local({"a": torch.arange(4.0)}, {"a": 4})
    assert kept["a"].tolist() == [False, False, False, True]


def test_masks_are_nested_in_the_count():
    s = {"a": torch.rand(50, generator=torch.Generator().manual_seed(0))}
    small, large = keep_local(s, {"a": 10}), keep_local(s, {"a": 30})
    assert not (large["a"] & ~small["a"]).any()


def test_pooled_ranks_across_groups_and_spares_the_best_of_each():
    scores = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([1.0, 2.0, 3.0])}
    kept = keep_pooled(scores, lambda c: sum(c.values()) <= 4)
    assert {n: int((~k).sum()) for n, k in kept.items()} == {"a": 2, "b": 2}
    assert kept["a"][2]
    assert kept["b"][2]


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ConfigError, match="neurons.1"):
        keep_local({"neurons.1": torch.tensor([1.0, torch.nan])}, {"neurons.1": 1})


@pytest.fixture
def model():
    return tiny_llama(num_hidden_layers=3)


def ranked(model, ranking, budget):
    """A choice among heads and neurons by drawn scores."""
    groups = llama_groups(model, ("heads", "neurons"))
    rng = torch.Generator().manual_seed(1)
    scores = {g.name: torch.rand(g.units, generator=rng) for g in groups}
    counts = {g.name: 1 if g.kind == "heads" else 4 + 2 * (g.layer or 0) for g in groups}
    return (
        groups,
        scores,
        counts,
        choose(model, groups, scores, Allocation(counts, ranking, budget)),
    )


@pytest.mark.parametrize("budget", ["units", "parameters"])
def test_all_groups_exchange_units_within_the_total(model, budget):
    groups, scores, counts, kept = ranked(model, "global", budget)
    want = pooled_by_hand(model, groups, scores, counts, budget)
    assert {n: m.tolist() for n, m in kept.items()} == {n: m.tolist() for n, m in want.items()}
    assert {n: int((~m).sum()) for n, m in kept.items()} != counts


@pytest.mark.parametrize("budget", ["units", "parameters"])
def test_groups_of_a_kind_exchange_units_within_its_total(model, budget):
    groups, scores, counts, kept = ranked(model, "kind", budget)
    want = {}
    for kind in ("heads", "neurons"):
        part = [g for g in groups if g.kind == kind]
        of_kind = {g.name: counts[g.name] for g in part}
        want |= pooled_by_hand(model, part, scores, of_kind, budget)
    assert {n: m.tolist() for n, m in kept.items()} == {n: m.tolist() for n, m in want.items()}
    for kind in ("heads", "neurons"):
        gone = sum(int((~m).sum()) for n, m in kept.items() if n.startswith(kind))
        assert gone == sum(c for n, c in counts.items() if n.startswith(kind))


def test_a_total_of_units_is_not_a_total_of_parameters(model):
    kept = [ranked(model, "global", budget)[3] for budget in ("units", "parameters")]
    assert any(not torch.equal(kept[0][n], kept[1][n]) for n in kept[0])


def test_a_local_ranking_takes_the_counts_as_they_are(model):
    _, _, counts, kept = ranked(model, "local", "parameters")
    assert {n: int((~m).sum()) for n, m in kept.items()} == counts


def test_the_nearest_cut_takes_the_unit_at_it_too():
    scores = {"a": torch.tensor([9.0, 5.0, 1.0]), "b": torch.tensor([8.0, 7.0, 6.0, 4.0])}
    sizes = {"a": 3, "b": 1}  # from the best down the sums are 3, 4, 5, 6, 9, 10, 13
    kept = keep_nearest(scores, sizes, 5 / 13)  # 8 are to stay: 9 is nearest, and its unit goes
    assert kept["a"].tolist() == [True, False, False]
    assert kept["b"].tolist() == [True, True, True, False]
    kept = keep_nearest(scores, sizes, 7 / 13)  # 6 are to stay
    assert kept["b"].tolist() == [True, True, False, False]
    assert all(m.all() for m in keep_nearest(scores, sizes, 0.0).values())


def test_the_nearest_cut_empties_no_group():
    scores = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([3.0, 2.0, 1.0])}
    kept = keep_nearest(scores, {"a": 1, "b": 1}, 0.9)
    assert kept["a"].tolist() == [False, True]
    assert kept["b"].tolist() == [True, False, False]


def test_a_unit_counts_as_whole_smallest_units(model):
    groups = llama_groups(model, ("heads", "neurons"))
    counts = {g.name: 1 for g in groups}
    sizes, share = whole_sizes(model, groups, Allocation(counts, "global", "parameters"))
    head, neuron = (next(g for g in groups if g.kind == k) for k in ("heads", "neurons"))
    held = {
        g: sum(
            model.get_parameter(m.param).numel()
            // model.get_parameter(m.param).shape[m.axis]
            * m.width
            for m in g.members
        )
        for g in (head, neuron)
    }
    assert sizes[neuron.name] == 1
    assert sizes[head.name] == held[head] // held[neuron]
    assert 0 < share < 1
    cut = choose(
        model,
        groups,
        {g.name: torch.arange(g.units).float() for g in groups},
        Allocation(counts, "global", "units", cut="nearest"),
    )
    assert whole_sizes(model, groups, Allocation(counts))[0] == dict.fromkeys(counts, 1)
    gone = sum(int((~m).sum()) for m in cut.values())
    assert gone == sum(counts.values()) + 1  # the unit at the cut goes too


@pytest.mark.parametrize("cut", ["within", "nearest"])
def test_as_many_experts_stay_as_a_router_picks(cut):
    model = tiny_model("qwen3_moe")
    groups = [g for g in discover(model) if g.kind == "experts"]
    scores = {g.name: torch.arange(5.0) + 10 * i for i, g in enumerate(groups)}
    allocation = Allocation({"experts.0": 3, "experts.1": 2}, "global", cut=cut)
    kept = choose(model, groups, scores, allocation)
    assert kept["experts.0"].tolist() == [False] * 3 + [True] * 2
    assert 1 <= int((~kept["experts.1"]).sum()) <= 3
    remove(model, kept)
