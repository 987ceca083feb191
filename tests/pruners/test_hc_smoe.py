"""Merged experts: who is merged, with what weight, what stays of the router; HC-SMoE and REAM."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from foreign import ListedMixtral, ListedSigmoid
from problems import check, problem, uniform
from tiny_models import tiny_model

from prunekit import graph
from prunekit.activations.runs import ModelRun
from prunekit.checkpoint.stock_config import stock_config
from prunekit.errors import ConfigError
from prunekit.graph.expert_bodies import check_alike, expert_bodies
from prunekit.registry import pruners
from prunekit.scoring.expert_outputs import expert_outputs
from prunekit.scoring.experts import expert_statistics
from prunekit.solvers.expert_merging import around_centroids, by_average_linkage, merge_cluster

TOKENS = torch.randint(8, 100, (6, 16), generator=torch.Generator().manual_seed(0))


SHORT = TOKENS % 97
"""Of the vocabulary of models whose experts are in a list."""


def listed(kind):
    torch.manual_seed(0)
    return kind().eval()


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
        logits = F.linear(x, mlp.gate.weight)
    torch.testing.assert_close(found.mean.float(), f.mean(1), rtol=1e-4, atol=1e-6)
    cosine = F.cosine_similarity(f[1], f[4]).mean() / 2 + 0.5
    profile = F.normalize(logits, dim=0).T
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
    for align in (True, False):
        twin = with_twins(mixtral, shuffle=True)
        bodies = expert_bodies(twin, group_of(twin), graph.discover(twin))
        merge_cluster(twin, bodies, [1, 3], torch.ones(5), align)
        off = float((experts(twin).down_proj[1] - experts(mixtral).down_proj[1]).abs().max())
        assert (off < 1e-5) == align


@pytest.mark.parametrize("arch", ["gpt_oss", "dbrx", "list"])
@torch.no_grad()
def test_biases_flat_weights_and_lists_are_aligned_as_well(arch):
    """Twins with other orders give the same expert whichever of them stays."""
    model = listed(ListedMixtral) if arch == "list" else tiny_model(arch)
    groups = graph.discover(model)
    group = next(g for g in groups if g.name == "experts.0")
    bodies = expert_bodies(model, group, groups)
    order = torch.randperm(bodies[1].neurons.units, generator=torch.Generator().manual_seed(1))
    shuffled = bodies[1].reordered(model, order)
    to = dict(zip(bodies[1].parts, bodies[3].parts, strict=True))
    for name, value in shuffled.items():
        bodies[3].write(model, to[name], value)
    before = {name: bodies[1].read(model, name) for name in bodies[1].parts}
    assert any(not torch.equal(shuffled[name], before[name]) for name in before)
    merge_cluster(model, bodies, [1, 3], torch.ones(5), align=True)
    for name, value in before.items():
        torch.testing.assert_close(bodies[1].read(model, name), value)


@pytest.mark.parametrize("kind", [ListedMixtral, ListedSigmoid])
@torch.no_grad()
def test_what_experts_in_a_list_put_out_is_that_of_a_plain_loop(kind):
    model, seen = listed(kind), []
    layer = model.layers[0]
    group = next(g for g in graph.discover(model) if g.name == "experts.0")
    hook = layer.post_attention_layernorm.register_forward_hook(
        lambda m, args, out: seen.append(out.flatten(0, 1))
    )
    found = expert_outputs(model, group, ModelRun(model, SHORT))
    hook.remove()
    f = torch.stack([e(seen[-1]) for e in layer.experts])
    torch.testing.assert_close(found.mean.float(), f.mean(1), rtol=1e-4, atol=1e-6)
    assert found.tokens == SHORT.numel()
    cosine = F.cosine_similarity(f[1], f[4]).mean()
    torch.testing.assert_close(found.cosine[1, 4] / found.tokens, cosine, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [ListedMixtral, ListedSigmoid])
@pytest.mark.parametrize("name", ["hc_smoe", "ream"])
@torch.no_grad()
def test_experts_in_a_list_are_merged_into_the_weighted_mean(name, kind):
    """Of twins into what they do; the router's rows of the others go."""
    model = listed(kind)
    a, b = model.layers[0].experts[1], model.layers[0].experts[3]
    order = torch.arange(60) if name == "hc_smoe" else torch.randperm(60)
    for module in ("w1", "w3"):
        b.get_submodule(module).weight.copy_(a.get_submodule(module).weight[order])
    b.w2.weight.copy_(a.w2.weight[:, order])
    pruned = pruners.build({"name": name, **({"size": 2} if name == "ream" else {})})(
        problem(copy.deepcopy(model), SHORT, ratio=uniform(0.2))
    )
    [pair] = pruned.notes["merged_experts"]["experts.0"]
    stays = pruned.kept["experts.0"].nonzero()[:, 0].tolist()
    layer = pruned.model.layers[0]
    assert len(layer.experts) == 4
    assert torch.equal(layer.gate.weight, model.layers[0].gate.weight[stays])
    at = stays.index(pair[0])
    if name == "hc_smoe":
        assert sorted(pair) == [1, 3]
        torch.testing.assert_close(layer.experts[at].w2.weight, a.w2.weight)
    elif sorted(pair) == [1, 3]:
        own = model.layers[0].experts[pair[0]].w2.weight
        torch.testing.assert_close(layer.experts[at].w2.weight, own)
    for e in set(stays) - {pair[0]}:
        after, before = layer.experts[stays.index(e)], model.layers[0].experts[e]
        assert torch.equal(after.w1.weight, before.w1.weight)
    if name == "hc_smoe":
        other = next(iter(pruned.notes["merged_experts"]["experts.1"]))
        n = pruned.kept["experts.1"].nonzero()[:, 0].tolist().index(other[0])
        merged = pruned.model.layers[1].experts[n].w1.weight
        spread = [model.layers[1].experts[e].w1.weight for e in other]
        share = float(((merged - spread[1]) / (spread[0] - spread[1])).median())
        assert 0.5 <= share <= 1
        expected = share * spread[0] + (1 - share) * spread[1]
        torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-5)


def test_experts_of_other_shapes_in_one_list_are_refused():
    model = listed(ListedMixtral)
    model.layers[1].experts[2].w1 = torch.nn.Linear(48, 60)
    with pytest.raises(ConfigError, match=r"experts.2 is not built like .*experts.0"):
        check_alike(
            model,
            next(g for g in graph.discover(listed(ListedMixtral)) if g.modules and g.layer == 1),
        )


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
