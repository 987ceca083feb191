"""A uniform ratio: the papers' floors, or a share of the parameters to within one unit."""

from __future__ import annotations

import math

import pytest
import torch
from problems import problem
from reference import llama_groups, tiny_llama
from tiny_models import tiny_model

from prunekit import graph
from prunekit.architecture.matrices import matrices
from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError
from prunekit.export.nemotron_nas import nemotron_nas_content
from prunekit.ratios.uniform import uniform
from prunekit.selection.units import keep_local
from prunekit.types import Group

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
@pytest.mark.parametrize("options", [{"loadable": "stock"}, {"loadable": "deci"}, {"multiple": 16}])
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


def floored(x):
    return math.floor(round(x, 6))


@pytest.mark.parametrize("target", [0.0, 0.333, 0.99])
@pytest.mark.parametrize("more", [{}, {"per_kind": {"weights": 0.7}}])
def test_of_matrices_ranked_together_the_total_alone_is_rounded_down(target, more):
    model = tiny_model("llama", layers=3)
    groups = matrices(model)
    share = more.get("per_kind", {"weights": target})["weights"]
    total = floored(share * sum(g.units for g in groups))
    options = {"target": target, "of": "units", **more}
    together = counted(model, groups, ranking="global", **options)
    alone = counted(model, groups, **options)
    assert sum(together.values()) == total
    assert sum(alone.values()) == sum(floored(share * g.units) for g in groups) <= total
    assert all(together[g.name] - alone[g.name] in (0, 1) for g in groups)


def test_the_nearest_cut_is_of_a_global_ranking():
    assert allocated(ranking="global", cut="nearest").cut == "nearest"
    for ranking in ("local", "kind"):
        with pytest.raises(ConfigError, match=r"ratio.ranking=global"):
            allocated(ranking=ranking, cut="nearest")


SIX_HEADS = {"heads": 12, "kv": 6, "hidden": 96, "head_dim": 8}


@pytest.mark.parametrize("of", ["model", "prunable", "units"])
def test_block_configs_hold_the_counts(of):
    """Widths without padding, heads alike though not every layer's neurons may go."""
    model = tiny_model("llama", layers=3, ffn=1536, **SIX_HEADS)
    every = [g for g in graph.discover(model) if g.kind in UNITS]
    groups = [g for g in every if g.name != "neurons.1"]
    counts = counted(model, groups, target=0.3, of=of, loadable="deci")
    assert len({counts[g.name] for g in groups if g.kind == "heads"}) == 1
    sizes = Sizes(model, groups)
    step = sizes.removed({"neurons.0": 256})
    asked = {"model": sizes.total, "prunable": sizes.prunable()}
    if of != "units":
        assert abs(sizes.removed(counts) - 0.3 * asked[of]) <= step / 2 + 1
    kept = keep_local({g.name: torch.arange(float(g.units)) for g in groups}, counts)
    pruned = graph.remove(model, kept)
    widths = [
        block["ffn"]["intermediate_size"]
        for block in nemotron_nas_content(pruned).config["block_configs"]
    ]
    assert widths == [layer.mlp.gate_proj.out_features for layer in pruned.model.layers]
    assert len(set(widths)) > 1


@pytest.mark.parametrize(
    ("kind", "chosen", "words"),
    [
        ("qwen3", {}, "models like llama.*not qwen3"),
        ("llama", {"layer": 0}, "heads in every layer.*exclude=none"),
        ("llama", {"ffn": 128}, "multiples of 256 neurons, neurons.0 has 128"),
    ],
)
def test_what_block_configs_do_not_hold_is_refused(kind, chosen, words):
    model = tiny_model(kind, layers=2, ffn=chosen.get("ffn", 512), **SIX_HEADS)
    groups = [
        g
        for g in graph.discover(model)
        if g.kind in UNITS and g.layer in (0, chosen.get("layer", 1))
    ]
    with pytest.raises(ConfigError, match=words):
        counted(model, groups, loadable="deci")


def test_block_configs_have_no_place_for_narrower_heads():
    model = tiny_model("llama", layers=2, ffn=512, **SIX_HEADS)
    with pytest.raises(ConfigError, match="no place for inner"):
        counted(model, [Group("inner.0", "inner", 0, 8)], loadable="deci")
