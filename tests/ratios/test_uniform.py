"""A uniform ratio: the papers' floors, or a share of the parameters to within one unit."""

from __future__ import annotations

import pytest
from problems import problem
from reference import llama_groups, tiny_llama

from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError
from prunekit.ratios.uniform import uniform

UNITS = ("heads", "neurons")


def allocated(**options):
    model = tiny_llama()
    return uniform(problem(model), llama_groups(model, UNITS), **options)


def counted(model, groups, **options):
    """Counts of ratio=uniform; shapes are enough for them."""
    return uniform(problem(model), groups, **options).counts


@pytest.mark.parametrize("of", ["model", "prunable"])
@pytest.mark.parametrize("target", [0.0, 0.05, 0.2, 0.31])
def test_solved_ratio_hits_within_one_unit(of, target):
    model = tiny_llama()
    groups = llama_groups(model, ("neurons", "heads"))
    sizes = Sizes(model, groups)
    counts = counted(model, groups, target=target, of=of)
    asked = target * (sizes.total if of == "model" else sizes.prunable())
    unit = sizes.removed({"neurons.0": 1})
    assert abs(sizes.removed(counts) - asked) <= unit
    assert all(counts[g.name] < g.units for g in groups)


def test_a_target_out_of_reach_says_what_can_be_reached():
    model = tiny_llama()
    with pytest.raises(ConfigError, match="hold at most"):
        counted(model, llama_groups(model, ("neurons",)), target=0.9, of="model")


def test_kinds_with_shares_of_their_own():
    """FLAP's UL-MM: heads and neurons are given their numbers apart."""
    model = tiny_llama()
    groups = llama_groups(model, UNITS)
    counts = counted(model, groups, target=0.25, of="units", per_kind={"heads": 0.4})
    assert {n: c for n, c in counts.items() if n.startswith("heads")} == {
        "heads.0": 1,
        "heads.1": 1,
    }
    assert {n: c for n, c in counts.items() if n.startswith("neurons")} == {
        "neurons.0": 5,
        "neurons.1": 5,
    }
    with pytest.raises(ConfigError, match=r"ratio.of=units"):
        counted(model, groups, target=0.25, per_kind={"heads": 0.4})


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({"of": "units"}, "units"),
        ({"of": "prunable"}, "parameters"),
        ({"of": "model"}, "parameters"),
        ({"of": "units", "budget": "parameters"}, "parameters"),
        ({"of": "model", "budget": "units"}, "units"),
    ],
)
def test_totals_are_counted_in_what_the_target_is_of(options, budget):
    found = allocated(ranking="global", **options)
    assert (found.ranking, found.budget) == ("global", budget)
    assert found.counts == allocated(of=options["of"]).counts


@pytest.mark.parametrize("ranking", ["kind", "global"])
@pytest.mark.parametrize("options", [{"loadable": "stock"}, {"multiple": 16}])
def test_a_pooled_ranking_refuses_what_it_could_not_keep(ranking, options):
    with pytest.raises(ConfigError, match=rf"ratio.ranking={ranking} moves units.*ranking=local"):
        allocated(ranking=ranking, **options)


def test_what_is_rounded_down_is_kept_or_removed():
    """LLM-Pruner floors what stays, FLAP (UL-UM) what goes."""
    by_floor = [allocated(target=0.3, of="units", floor=f).counts for f in ("kept", "removed")]
    groups = llama_groups(tiny_llama(), UNITS)
    units = {g.name: g.units for g in groups}
    assert by_floor[1] == {n: int(u * 0.3) for n, u in units.items()}
    assert all(by_floor[0][n] >= by_floor[1][n] for n in units)
    assert by_floor[0] != by_floor[1]
    with pytest.raises(ConfigError, match=r"give ratio.of=units"):
        allocated(target=0.3, of="model", floor="removed")


def test_the_nearest_cut_is_of_a_global_ranking():
    assert allocated(ranking="global", cut="nearest").cut == "nearest"
    for ranking in ("local", "kind"):
        with pytest.raises(ConfigError, match=r"ratio.ranking=global"):
            allocated(ranking=ranking, cut="nearest")
