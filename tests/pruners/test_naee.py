"""NAEE: the best of all sets, greedy where there are too many, on the router as it is when experts
are gone.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from problems import check, problem, uniform
from tiny_models import tiny_model

from prunekit import graph
from prunekit.checkpoint.stock_config import stock_config
from prunekit.errors import ConfigError
from prunekit.registry import pruners

TOKENS = torch.randint(8, 100, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mixtral():
    return tiny_model("mixtral")


def run(model, name="naee", share=0.4, **options):
    pruned = copy.deepcopy(model)
    return pruners.build({"name": name, **options})(problem(pruned, TOKENS, ratio=uniform(share)))


def removed(model, layer, gone):
    """A copy without the experts `gone` of a layer."""
    mask = torch.ones(5, dtype=torch.bool)
    mask[list(gone)] = False
    return graph.remove(copy.deepcopy(model), {f"experts.{layer}": mask})


def out(model, layer):
    """(N, T C) of a layer's experts on the text."""
    seen = []
    hook = model.model.layers[layer].mlp.register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    return seen[0].reshape(len(TOKENS), -1)


def best_set(model, layer):
    """By removing every pair in turn."""
    dense = out(model, layer)
    losses = {
        gone: float((out(removed(model, layer, gone), layer) - dense).norm(dim=1).sum())
        for gone in itertools.combinations(range(5), 2)
    }
    gone = min(losses, key=losses.get)
    return gone, losses[gone]


def test_the_set_is_the_best_of_all_with_the_experts_really_gone(mixtral):
    pruned = run(mixtral)
    gone, loss = best_set(mixtral, 0)
    found = (~pruned.kept["experts.0"]).nonzero()[:, 0].tolist()
    assert found == list(gone)
    assert pruned.notes["naee"]["experts.0"] == {"loss": pytest.approx(loss, rel=1e-4), "sets": 10}


def test_later_layers_are_searched_on_what_the_pruned_ones_put_out(mixtral):
    pruned = run(mixtral)
    first = (~pruned.kept["experts.0"]).nonzero()[:, 0].tolist()
    _, loss = best_set(removed(mixtral, 0, first), 1)
    assert pruned.notes["naee"]["experts.1"]["loss"] == pytest.approx(loss, rel=1e-4)


def test_too_many_sets_are_searched_one_expert_at_a_time(mixtral):
    pruned = run(mixtral, limit=9)
    assert pruned.notes["naee"]["experts.0"]["sets"] == 5 + 4
    assert pruned.notes["naee"]["experts.0"]["loss"] >= best_set(mixtral, 0)[1] * (1 - 1e-5)
    dense = out(mixtral, 0)
    alone = [float((out(removed(mixtral, 0, [e]), 0) - dense).norm(dim=1).sum()) for e in range(5)]
    assert not pruned.kept["experts.0"][int(torch.tensor(alone).argmin())]


def test_the_result_is_a_smaller_model_of_its_class_and_hooks_are_gone(mixtral):
    pruned = run(mixtral)
    assert pruned.model.model.layers[0].mlp.experts.down_proj.shape[0] == 3
    assert stock_config(pruned.model).num_local_experts == 3
    mlp = pruned.model.model.layers[0].mlp
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in mlp.modules())


def test_fewer_experts_than_a_token_picks_are_refused_before_anything_runs(mixtral):
    asked = problem(mixtral, ratio=uniform(0.8))
    with pytest.raises(ConfigError, match=r"1 of 5 units of experts\.0 .* picks 2"):
        check("naee", asked)
    with pytest.raises(ConfigError, match="ranking=local"):
        check("naee", problem(mixtral, ratio=uniform(0.4, ranking="global")))


def test_the_router_and_experts_need_not_be_a_module_that_is_called():
    """JetMoE's experts of attention: the loss is that of the attention around them."""
    model = tiny_model("jetmoe")
    pruned = run(model, share=0.2)

    def attended(m):
        seen = []
        part = m.model.layers[0].self_attention
        hook = part.register_forward_hook(lambda _, args, out: seen.append(out[0]))
        with torch.no_grad():
            m(TOKENS)
        hook.remove()
        return seen[0].reshape(len(TOKENS), -1)

    dense, losses = attended(model), []
    for e in range(5):
        without = graph.remove(copy.deepcopy(model), {"experts.0.1": torch.arange(5) != e})
        losses.append(float((attended(without) - dense).norm(dim=1).sum()))
    assert int(pruned.kept["experts.0.1"].int().argmin()) == losses.index(min(losses))
    assert pruned.notes["naee"]["experts.0.1"]["loss"] == pytest.approx(min(losses), rel=1e-4)
    assert pruned.model.model.layers[0].self_attention.experts.router.layer.out_features == 4
