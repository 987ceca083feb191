"""Merged experts: who is merged, with what weight, what stays of the router; HC-SMoE and REAM."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from problems import check, problem, uniform
from tiny_models import tiny_model

from prunekit import graph
from prunekit.activations.runs import ModelRun
from prunekit.checkpoint.stock_config import stock_config
from prunekit.errors import ConfigError
from prunekit.registry import pruners
from prunekit.scoring.expert_outputs import expert_outputs
from prunekit.scoring.experts import expert_statistics
from prunekit.solvers.expert_merging import around_centroids, by_average_linkage

TOKENS = torch.randint(8, 100, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mixtral():
    return tiny_model("mixtral")


def run(model, name, share=0.2, **options):
    pruned = copy.deepcopy(model)
    return pruners.build({"name": name, **options})(problem(pruned, TOKENS, ratio=uniform(share)))


def experts(model, layer=0):
    return model.model.layers[layer].mlp.experts


@torch.no_grad()
def with_twins(model, shuffle):
    """Expert 3 of layer 0 does what expert 1 does, its neurons in another order; their routers ask
    for different tokens.
    """
    twin = copy.deepcopy(model)
    held = experts(twin)
    n = held.down_proj.shape[2]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    order = order if shuffle else torch.arange(n)
    held.gate_up_proj[3] = held.gate_up_proj[1][torch.cat([order, order + n])]
    held.down_proj[3] = held.down_proj[1][:, order]
    return twin


def group_of(model):
    return next(g for g in graph.discover(model) if g.name == "experts.0")


def test_what_all_experts_put_out_is_that_of_a_plain_loop(mixtral):
    seen = []
    mlp = mixtral.model.layers[0].mlp
    hook = mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 64)))
    found = expert_outputs(mixtral, group_of(mixtral), ModelRun(mixtral, TOKENS))
    hook.remove()
    x, held = torch.cat(seen[-1:]), mlp.experts
    with torch.no_grad():
        outputs = []
        for e in range(5):
            gate, up = F.linear(x, held.gate_up_proj[e]).chunk(2, -1)
            outputs.append(F.linear(F.silu(gate) * up, held.down_proj[e]))
        f = torch.stack(outputs)
        p = F.linear(x, mlp.gate.weight).softmax(-1)
    torch.testing.assert_close(found.mean.float(), f.mean(1), rtol=1e-4, atol=1e-6)
    cosine = F.cosine_similarity(f[1], f[4]).mean() / 2 + 0.5
    profile = F.normalize(p, dim=0).T
    far = torch.cdist(profile, profile)
    expected = (cosine + 1 - far[1, 4] / far.max()) / 2
    torch.testing.assert_close(found.similarity()[1, 4].float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["hc_smoe", "ream"])
def test_experts_that_do_the_same_are_merged_into_what_they_do(name, mixtral):
    twin = with_twins(mixtral, shuffle=name == "ream")
    pruned = run(twin, name, **({"size": 2} if name == "ream" else {}))
    statistics = expert_statistics(twin, [group_of(twin)], ModelRun(twin, TOKENS))["experts.0"]
    [pair] = pruned.notes["merged_experts"]["experts.0"]
    if name == "hc_smoe":
        assert sorted(pair) == [1, 3]
        assert statistics.frequency[pair[0]] >= statistics.frequency[pair[1]]
    stays = pruned.kept["experts.0"].nonzero()[:, 0].tolist()
    assert pair[0] in stays
    assert pair[1] not in stays
    if sorted(pair) == [1, 3]:
        at = stays.index(pair[0])
        torch.testing.assert_close(
            experts(pruned.model).down_proj[at], experts(twin).down_proj[pair[0]]
        )
    rows = twin.model.layers[0].mlp.gate.weight[stays]
    assert torch.equal(pruned.model.model.layers[0].mlp.gate.weight, rows)


def test_a_merged_expert_is_the_mean_weighted_by_how_often_each_is_picked(mixtral):
    pruned = run(mixtral, "hc_smoe")
    [(first, other)] = pruned.notes["merged_experts"]["experts.0"]
    n = expert_statistics(mixtral, [group_of(mixtral)], ModelRun(mixtral, TOKENS))["experts.0"]
    a, b = (float(n.frequency[e]) for e in (first, other))
    old = experts(mixtral).gate_up_proj
    expected = (a * old[first] + b * old[other]) / (a + b)
    at = pruned.kept["experts.0"].nonzero()[:, 0].tolist().index(first)
    torch.testing.assert_close(experts(pruned.model).gate_up_proj[at], expected)


def test_neurons_in_another_order_are_put_back_before_the_mean_is_taken(mixtral):
    """Without, twins that differ in the order alone come out as something else."""
    from prunekit.solvers.expert_merging import merge_cluster

    group = group_of(mixtral)
    neurons = next(g for g in graph.discover(mixtral) if g.name == "neurons.0")
    for arch_neurons, same in ((neurons, True), (None, False)):
        twin = with_twins(mixtral, shuffle=True)
        merge_cluster(twin, group, [1, 3], torch.ones(5), arch_neurons)
        off = float((experts(twin).down_proj[1] - experts(mixtral).down_proj[1]).abs().max())
        assert (off < 1e-5) == same


@pytest.mark.parametrize("arch", ["gpt_oss", "dbrx"])
def test_biases_and_flat_weights_are_aligned_as_well(arch):
    """Twins with other orders give the same model whichever of them stays."""
    from prunekit.graph.expert_neurons import (
        expert_members,
        expert_slice,
        neuron_members,
        neurons_inside,
        places,
        put_slice,
        reordered,
    )
    from prunekit.solvers.expert_merging import merge_cluster

    model = tiny_model(arch)
    groups = graph.discover(model)
    group = next(g for g in groups if g.name == "experts.0")
    members = expert_members(model, group)
    neurons = neurons_inside(groups, members)
    order = torch.randperm(neurons.units, generator=torch.Generator().manual_seed(1))
    inside = {s.param: m for s, m in neuron_members(members, neurons)}
    for m in members:
        part = expert_slice(model, m, 1)
        if m.param in inside:
            part = reordered(part, inside[m.param].axis, places(m, inside[m.param], 1), order)
        put_slice(model, m, 3, part)
    before = {m.param: expert_slice(model, m, 1) for m in members}
    merge_cluster(model, group, [1, 3], torch.ones(5), neurons)
    for m in members:
        torch.testing.assert_close(expert_slice(model, m, 1), before[m.param])


def test_groups_are_those_of_the_papers():
    vectors = torch.tensor([[0.0], [10.0], [0.5], [10.2], [30.0]]).double()
    frequency = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0])
    found = by_average_linkage(vectors, 3, frequency)
    assert sorted(found) == [[1, 3], [2, 0], [4]]
    scores = torch.tensor([5.0, 4.0, 1.0, 2.0, 3.0])
    alike = torch.zeros(5, 5)
    alike[0, 3] = alike[1, 2] = 1
    alike[0, 4] = 0.5
    assert around_centroids(scores, alike, 2, 2 + 1) == [[0, 3, 4], [1, 2]]
    assert around_centroids(scores, alike, 2, 5) == [[0, 3, 4, 2], [1]]
    with pytest.raises(ConfigError, match="size=2"):
        around_centroids(scores, alike, 2, 2)


def test_the_result_is_a_smaller_model_of_its_class(mixtral):
    pruned = run(mixtral, "ream", share=0.4)
    assert stock_config(pruned.model).num_local_experts == 3
    assert torch.isfinite(pruned.model(TOKENS).logits).all()


def test_a_ratio_that_moves_experts_between_layers_is_refused():
    with pytest.raises(ConfigError, match="ranking=local"):
        check("ream", problem(tiny_model("mixtral"), ratio=uniform(0.4, ranking="global")))
