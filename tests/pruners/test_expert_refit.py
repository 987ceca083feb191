"""Structured OBS inside experts: each expert's own least squares, on the tokens routed to it."""

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
from prunekit.errors import ConfigError
from prunekit.registry import pruners
from prunekit.scoring.expert_grams import expert_grams
from prunekit.scoring.listed_experts import lone_neurons

TOKENS = torch.randint(8, 90, (12, 24), generator=torch.Generator().manual_seed(0))
LISTED = {"mixtral": ListedMixtral, "sigmoid": ListedSigmoid}


def listed(name):
    torch.manual_seed(0)
    return LISTED[name]().eval()


def run(model, share=0.25, **options):
    pruned = copy.deepcopy(model)
    made = pruners.build({"name": "expert_neurons", "refit": True, **options})
    return made(problem(pruned, TOKENS, ratio=uniform(share)))


def softmax_routing(moe, x):
    value, index = F.linear(x, moe.gate.weight).softmax(-1).topk(2, dim=-1)
    return index, value / value.sum(-1, keepdim=True)


def sigmoid_routing(moe, x):
    p = F.linear(x, moe.gate.weight).sigmoid()
    index = (p + moe.gate.e_score_correction_bias).topk(2, dim=-1)[1]
    value = p.gather(1, index)
    return index, value / value.sum(-1, keepdim=True) * moe.gate.routed_scaling_factor


FUSED = {"mixtral": (softmax_routing, 0), "deepseek_v3": (sigmoid_routing, 1)}


@torch.no_grad()
def fused_tokens(model, name):
    """Of the first routed block: the experts' neurons and their router's weights, expert by
    expert.
    """
    routing, layer = FUSED[name]
    seen, mlp = [], model.model.layers[layer].mlp
    hook = mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 64)))
    model(TOKENS)
    hook.remove()
    index, value = routing(mlp, seen[0])
    found = []
    for e in range(5):
        token, place = (index == e).nonzero(as_tuple=True)
        order = token.argsort()
        gate, up = F.linear(seen[0][token[order]], mlp.experts.gate_up_proj[e]).chunk(2, -1)
        found.append((F.silu(gate) * up, value[token, place][order]))
    return found


@torch.no_grad()
def listed_tokens(model, name):
    """The same of the first block of a model whose experts are in a list."""
    seen, layer = [], model.layers[0]
    hook = layer.post_attention_layernorm.register_forward_hook(
        lambda m, args, out: seen.append(out.flatten(0, 1))
    )
    model(TOKENS)
    hook.remove()
    logits = layer.gate(seen[0])
    if name == "mixtral":
        value, index = logits.softmax(-1).topk(2, dim=-1)
        value = value / value.sum(-1, keepdim=True)
    else:
        index = (logits.sigmoid() + layer.correction).topk(2, dim=-1)[1]
        value = 1.5 * logits.sigmoid().gather(1, index)
    found = []
    for e, w in enumerate(layer.experts):
        token, place = (index == e).nonzero(as_tuple=True)
        order = token.argsort()
        x = seen[0][token[order]]
        found.append((F.silu(w.w1(x)) * w.w3(x), value[token, place][order]))
    return found


def least_squares(weight, a, g, kept, ridge):
    """The map from the neurons `kept` nearest to `weight`: rows of the router's weight times the
    neurons, and below them one row a neuron that stands for `ridge` tokens.
    """
    a, weight = (g[:, None] * a).double(), weight.double()
    own = ridge / len(a) * a.square().sum(0)
    floor = 1e-6 * a.square().sum(0).max()
    rows = torch.cat([a, own.clamp(min=floor).sqrt().diag()])
    return torch.linalg.lstsq(rows[:, kept], rows @ weight.T).solution.T.float()


def check_against_plain(weight, pruned, kept, tokens, ridges):
    """Every expert's `down_proj`, before and after, both (outputs, F)."""
    for e, (a, g) in enumerate(tokens):
        expected = least_squares(weight[e], a, g, kept[e], ridges[e])
        torch.testing.assert_close(pruned[e], expected, rtol=2e-3, atol=2e-4)
    moved = [(p - w[:, k]).abs().max() for p, w, k in zip(pruned, weight, kept, strict=True)]
    assert max(moved) > 0.01


@pytest.mark.parametrize("name", list(FUSED))
def test_each_expert_in_a_tensor_gets_the_closed_form_of_its_own_tokens(name):
    model = tiny_model(name)
    layer = FUSED[name][1]
    if name == "deepseek_v3":
        model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.linspace(0, 0.4, 5))
    pruned = run(model, score="wanda_sp")
    tokens = fused_tokens(model, name)
    old, new = (m.model.layers[layer].mlp.experts.down_proj.detach() for m in (model, pruned.model))
    n = new.shape[2]
    kept = [
        (old[e].abs().sum(0) * (g[:, None] * a).norm(dim=0)).argsort(descending=True)[:n]
        for e, (a, g) in enumerate(tokens)
    ]
    check_against_plain(old, new, kept, tokens, pruned.notes["ridges"][f"neurons.{layer}"])
    gate = pruned.model.model.layers[layer].mlp.experts.gate_up_proj[2]
    rows = torch.cat([kept[2], kept[2] + old.shape[2]])
    assert torch.equal(gate, model.model.layers[layer].mlp.experts.gate_up_proj[2][rows])


@pytest.mark.parametrize("name", list(LISTED))
@pytest.mark.parametrize("score", ["wanda_sp", "obs"])
def test_each_expert_in_a_list_does_too(name, score):
    model = listed(name)
    pruned = run(model, score=score)
    kept = [pruned.kept[f"neurons.0.e{e}"].nonzero()[:, 0] for e in range(5)]
    tokens = listed_tokens(model, name)
    old, new = ([e.w2.weight.detach() for e in m.layers[0].experts] for m in (model, pruned.model))
    ridges = [pruned.notes["ridges"][f"neurons.0.e{e}"][0] for e in range(5)]
    check_against_plain(old, new, kept, tokens, ridges)
    if score == "wanda_sp":
        lowest = old[1].abs().sum(0) * (tokens[1][1][:, None] * tokens[1][0]).norm(dim=0)
        assert lowest[kept[1]].min() >= lowest.sort().values[60 - len(kept[1])]
    if name == "sigmoid":
        assert torch.equal(
            pruned.model.layers[0].shared.w2.weight, model.layers[0].shared.w2.weight
        )


@torch.no_grad()
def test_obs_takes_the_neuron_that_the_others_best_make_up_for():
    """One neuron of each expert, by trying all."""
    model = listed("mixtral")
    pruned = run(model, 1 / 61, score="obs")
    for e, (a, g) in enumerate(listed_tokens(model, "mixtral")):
        weight = model.layers[0].experts[e].w2.weight
        ridge, costs = 4.0 * 60, []
        own = (g[:, None] * a).double()
        H = own.T @ own
        H = H + (ridge / len(a) * H.diagonal()).diag()
        for j in range(60):
            kept = torch.arange(60)[torch.arange(60) != j]
            off = weight.double().clone()
            off[:, kept] -= least_squares(weight, a, g, kept, ridge)
            costs.append(float(((off @ H) * off).sum()))
        gone = (~pruned.kept[f"neurons.0.e{e}"]).nonzero()[:, 0].tolist()
        assert gone == [min(range(60), key=costs.__getitem__)]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "deepseek_v3"])
@torch.no_grad()
def test_zeros_in_the_place_of_what_goes_give_the_same_model(name, monkeypatch):
    """Experts with biases and experts stacked in two axes too."""
    model = tiny_model(name)
    pruned = run(model, score="obs")
    assert pruned.notes["ridges"]
    assert all(not mask.all() for mask in pruned.kept.values())
    zeroed = copy.deepcopy(model)
    monkeypatch.setattr(graph, "remove", lambda model, kept: model)
    made = pruners.build({"name": "expert_neurons", "refit": True, "score": "obs"})
    made(problem(zeroed, TOKENS, ratio=uniform(0.25)))
    assert [p.shape for p in zeroed.parameters()] == [p.shape for p in model.parameters()]
    torch.testing.assert_close(
        zeroed(TOKENS).logits, pruned.model(TOKENS).logits, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_the_experts_keep_more_of_what_they_put_out():
    model = tiny_model("mixtral")
    dense = model(TOKENS).logits
    off = {}
    for refit in (False, True):
        out = run(model, 0.5, refit=refit).model(TOKENS).logits
        off[refit] = float((out - dense).square().mean())
    assert off[True] < off[False]


def test_weights_of_experts_with_few_tokens_stay_and_the_notes_say_so(caplog):
    model = listed("mixtral")
    with torch.no_grad():  # no token picks what is always asked for least
        gate = model.layers[0].gate.weight
        gate[3] = -100 * gate[[0, 1, 2, 4]].mean(0)
    tokens = [len(g) for _, g in listed_tokens(model, "mixtral")]
    few = sorted(tokens)[1] + 1
    pruned = run(model, score="obs", min_tokens=few)
    left = {e for e, n in enumerate(tokens) if n < few}
    assert len(left) == 2
    for e in left:
        name = f"neurons.0.e{e}"
        assert pruned.notes["few_tokens"][name] == {0: tokens[e]}
        assert name not in pruned.notes["ridges"]
        old, new = (m.layers[0].experts[e].w2.weight for m in (model, pruned.model))
        assert torch.equal(new, old[:, pruned.kept[name]])
    assert f"fewer than {few} tokens" in caplog.text
    assert pruned.notes["ridges"].keys() >= {f"neurons.0.e{e}" for e in set(range(5)) - left}


def test_grams_of_lists_and_tensors_count_tokens_alike():
    model = listed("sigmoid")
    groups = graph.discover(model)
    alone = lone_neurons(groups, shared=True)
    grams = expert_grams(model, [], alone, ModelRun(model, TOKENS), weighted=False)
    assert sum(one.experts is None for one in alone) == 3
    for one in alone:
        [folds] = grams[one.neurons.name]
        if one.experts is None:  # reached by all tokens, in two halves
            assert [f.tokens for f in folds] == [TOKENS.numel() // 2] * 2
    a, g = listed_tokens(model, "sigmoid")[2]
    [folds] = grams["neurons.0.e2"]
    torch.testing.assert_close(sum(f.gram for f in folds), a.T @ a, rtol=1e-4, atol=1e-5)
    assert sum(f.tokens for f in folds) == len(g)


@pytest.mark.parametrize("score", ["obs", "taylor"])
def test_nothing_goes_at_ratio_zero(score):
    for model in (tiny_model("mixtral"), listed("sigmoid")):
        pruned = run(model, 0.0, score=score)
        for a, b in zip(model.parameters(), pruned.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_shared_experts_lose_neurons_where_that_is_asked():
    model = tiny_model("deepseek_v3")
    pruned = run(model, 0.5, shared=True, score="obs")
    assert set(pruned.kept) == {"neurons.1", "neurons.1.1"}
    mlp = pruned.model.model.layers[1].mlp
    assert (mlp.shared_experts.down_proj.in_features, mlp.experts.down_proj.shape[2]) == (16, 16)
    assert pruned.model.model.layers[0].mlp.down_proj.in_features == 96


def test_a_ratio_that_exchanges_neurons_is_refused():
    asked = problem(tiny_model("mixtral"), ratio=uniform(0.2, ranking="global"))
    with pytest.raises(ConfigError, match="ranking=local"):
        check("expert_neurons", asked, score="obs", refit=True)
