"""`loadable=stock`: uniform counts that the architecture's own class accepts, near
the asked share.
"""

from __future__ import annotations

import pytest
import torch
from problems import check, problem
from reference import tiny_llama
from tiny_models import tiny_model

from prunekit import graph
from prunekit.architecture.sizes import Sizes
from prunekit.checkpoint.stock_config import stock_config
from prunekit.errors import ConfigError
from prunekit.ratios.uniform import uniform
from prunekit.selection.units import keep_local


def counted(model, groups, **options):
    return uniform(problem(model), groups, **options).counts


def groups_of(model, *kinds):
    return [g for g in graph.discover(model) if g.kind in kinds]


@pytest.mark.parametrize("of", ["model", "units"])
@pytest.mark.parametrize("kinds", [("neurons", "heads"), ("neurons",), ("hidden",)])
def test_stock_counts_load_stock(kinds, of):
    model = tiny_llama()
    groups = groups_of(model, *kinds)
    counts = counted(model, groups, target=0.2, of=of, loadable="stock")
    assert len({counts[g.name] for g in groups if g.kind == "neurons"}) <= 1
    assert any(counts.values())
    kept = keep_local({g.name: torch.arange(float(g.units)) for g in groups}, counts)
    assert stock_config(graph.remove(model, kept)) is not None


def test_neurons_take_up_the_rest_of_the_budget():
    model = tiny_llama()
    groups = groups_of(model, "neurons", "heads")
    sizes = Sizes(model, groups)
    counts = counted(model, groups, target=0.2, of="model", loadable="stock")
    neuron_of_every_layer = sizes.removed({"neurons.0": 1, "neurons.1": 1})
    assert abs(sizes.removed(counts) - 0.2 * sizes.total) <= neuron_of_every_layer


def test_an_excluded_layer_is_refused_with_what_to_do():
    model = tiny_llama()
    with pytest.raises(ConfigError, match="exclude=none"):
        counted(
            model,
            [g for g in groups_of(model, "neurons") if g.layer == 0],
            target=0.2,
            loadable="stock",
        )


def test_multiples_hold():
    model = tiny_llama()
    groups = groups_of(model, "neurons")
    counts = counted(model, groups, target=0.2, of="units", multiple=4, loadable="stock")
    assert all((g.units - counts[g.name]) % 4 == 0 for g in groups)


def inside(model, target, of="units", **options):
    node = {"name": "uniform", "target": target, "of": of, "loadable": "stock"}
    asked = problem(model, ratio=node)
    return check("expert_neurons", asked, **options).counts


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("qwen2_moe", {}, {"neurons.0": 8, "neurons.1": 8}),
        ("deepseek_v3", {"shared": True}, {"neurons.1": 8, "neurons.1.1": 8}),
    ],
)
def test_neurons_inside_experts_need_not_be_those_of_every_block(name, options, expected):
    """Shared experts with a size of their own, or one that follows; a dense first block."""
    model = tiny_model(name)
    counts = inside(model, 0.25, **options)
    assert counts == expected
    kept = keep_local({n: torch.arange(32.0) for n in counts}, counts)
    config = stock_config(graph.remove(model, kept))
    assert config.moe_intermediate_size == 24
    assert config.intermediate_size == 96


def test_one_field_for_dense_blocks_and_experts_is_refused():
    with pytest.raises(ConfigError, match=r"cannot be built .* loadable=any"):
        inside(tiny_model("jamba", intermediate_size=32), 0.25)


def test_shared_experts_that_follow_the_routed_ones_are_named():
    same = r"or the same share of neurons \(model.layers.mlp.shared_experts.*, or loadable"
    with pytest.raises(ConfigError, match=same):
        inside(tiny_model("deepseek_v3"), 0.25)


def test_half_of_the_neurons_of_routed_experts_make_a_shared_one_two():
    """Its size is so many times that of a routed one; what comes of fewer is no multiple."""
    model = tiny_model("deepseek_v3")
    counts = inside(model, 0.5)
    assert counts == {"neurons.1": 16}
    pruned = graph.remove(model, keep_local({"neurons.1": torch.arange(32.0)}, counts))
    config = stock_config(pruned)
    assert (config.moe_intermediate_size, config.n_shared_experts) == (16, 2)
    assert config.intermediate_size == 96
    stock = type(model)(config).eval()
    stock.load_state_dict(pruned.state_dict())
    ids = torch.arange(8, 24)[None]
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, pruned(ids).logits)
    with pytest.raises(ConfigError, match="possible: a ratio that removes 16 of 32, or the same"):
        inside(tiny_model("deepseek_v3"), 0.3)


def test_all_neurons_of_a_mixture_lose_the_same_share():
    """Dense blocks of 96, experts and shared experts of 32."""
    model = tiny_model("deepseek_v3")
    counts = counted(
        model, groups_of(model, "neurons"), target=0.2, of="prunable", loadable="stock"
    )
    assert counts["neurons.1"] == counts["neurons.1.1"] > 0
    assert abs(counts["neurons.0"] - 3 * counts["neurons.1"]) <= 1
