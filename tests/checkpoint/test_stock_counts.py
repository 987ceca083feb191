"""`loadable=stock`: uniform counts that the architecture's own class accepts, near
the asked share.
"""

from __future__ import annotations

import pytest
import torch
from problems import problem
from reference import tiny_llama

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
