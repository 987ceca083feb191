"""Neurons inside experts: each expert its own, one number for all, against plain loops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from foreign import ListedMixtral
from problems import check, problem, uniform
from tiny_models import tiny_model

from prunekit import graph
from prunekit.activations.runs import ModelRun
from prunekit.checkpoint.stock_config import stock_config
from prunekit.errors import ConfigError
from prunekit.graph.expert_neurons import reorder_neurons
from prunekit.registry import pruners
from prunekit.scoring.expert_inputs import expert_inputs, fused_experts
from prunekit.scoring.expert_neurons import neuron_scores

TOKENS = torch.randint(8, 90, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mixtral():
    return tiny_model("mixtral")


def run(model, share=0.25, **options):
    pruned = copy.deepcopy(model)
    made = pruners.build({"name": "expert_neurons", **options})
    return made(problem(pruned, TOKENS, ratio=uniform(share)))


def fused_of(model):
    return fused_experts(model, graph.discover(model))


@torch.no_grad()
def plain(model, layer=0):
    """(E, C) and (E, F) norms of what is read, times the router's weight, and sums of |w|."""
    seen, mlp = [], model.model.layers[layer].mlp
    hook = mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 64)))
    model(TOKENS)
    hook.remove()
    x, held = seen[0], mlp.experts
    p = F.linear(x, mlp.gate.weight).softmax(-1)
    value, index = p.topk(2, dim=-1)
    value = value / value.sum(-1, keepdim=True)
    entering, inside = [], []
    for e in range(held.down_proj.shape[0]):
        token, place = (index == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], held.gate_up_proj[e]).chunk(2, -1)
        g = value[token, place, None]
        entering.append((g * x[token]).square().sum(0))
        inside.append((g * F.silu(gate) * up).square().sum(0))
    return torch.stack(entering), torch.stack(inside)


def test_what_experts_read_is_that_of_a_plain_loop(mixtral):
    """96 neurons of 64 channels: more neurons than the experts put out at once."""
    found = expert_inputs(mixtral, fused_of(mixtral), ModelRun(mixtral, TOKENS), True)
    entering, inside = plain(mixtral)
    torch.testing.assert_close(found["experts.0"].entering, entering, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["experts.0"].inside, inside, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "llama4_text", "deepseek_v3"])
def test_another_order_of_neurons_inside_an_expert_changes_nothing(name):
    """Biases, experts stacked in two axes, transposed ones."""
    model = tiny_model(name)
    with torch.no_grad():
        before = model(TOKENS).logits
        draw = torch.Generator().manual_seed(1)
        for f in fused_of(model):
            first = model.get_parameter(f.writer[0].param).clone()
            for e in range(f.experts):
                order = torch.randperm(f.neurons.units, generator=draw)
                reorder_neurons(model, f.slabs, f.neurons, e, order)
            assert not torch.equal(model.get_parameter(f.writer[0].param), first)
        torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def masked(model, orders, left):
    """Each expert without the neurons behind its first `left` in `orders[layer] (E, F)`."""
    for layer, order in orders.items():
        held = model.model.layers[layer].mlp.experts
        for e, o in enumerate(order):
            held.down_proj[e][:, o[left:]] = 0
    return model(TOKENS).logits


@pytest.mark.parametrize("score", ["wanda_sp", "taylor", "magnitude"])
def test_each_expert_loses_its_own_lowest_neurons(mixtral, score):
    fused = fused_of(mixtral)
    found = neuron_scores(mixtral, fused, [], ModelRun(mixtral, TOKENS), score, True)
    if score == "wanda_sp":
        held = mixtral.model.layers[0].mlp.experts
        expected = held.down_proj.detach().abs().sum(1) * plain(mixtral)[1].sqrt()
        torch.testing.assert_close(found["neurons.0"], expected, rtol=1e-4, atol=1e-6)
    orders = {i: found[f"neurons.{i}"].argsort(1, descending=True) for i in (0, 1)}
    pruned = run(mixtral, score=score)
    assert [m.model.layers[0].mlp.experts.down_proj.shape[2] for m in (mixtral, pruned.model)] == [
        96,
        72,
    ]
    expected = masked(copy.deepcopy(mixtral), orders, 72)
    with torch.no_grad():
        torch.testing.assert_close(pruned.model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def test_taylor_is_the_size_of_weight_times_gradient(mixtral):
    model = copy.deepcopy(mixtral)
    found = neuron_scores(model, fused_of(model), [], ModelRun(model, TOKENS), "taylor", True)
    model(TOKENS, labels=TOKENS).loss.backward()
    held = model.model.layers[1].mlp.experts
    up = (held.gate_up_proj * held.gate_up_proj.grad).abs().sum(2)
    down = (held.down_proj * held.down_proj.grad).abs().sum(1)
    expected = (up[:, :96] + up[:, 96:] + down).detach()
    torch.testing.assert_close(found["neurons.1"], expected, rtol=1e-3, atol=1e-7)


def test_what_half_precision_would_round_to_zero_counts(mixtral, monkeypatch):
    """Products of weights and gradients, which are below the smallest number of float16."""

    def small(model, names, run, sink, **_):
        for name in names:
            weight = torch.full_like(model.get_parameter(name), 1e-3, dtype=torch.float16)
            sink(name, weight, weight.clone().fill_(1e-5), None)

    monkeypatch.setattr("prunekit.scoring.expert_neurons.backward", small)
    found = neuron_scores(mixtral, fused_of(mixtral), [], ModelRun(mixtral, TOKENS), "taylor", True)
    channels = mixtral.config.hidden_size
    torch.testing.assert_close(
        found["neurons.0"], torch.full((5, 96), 3 * channels * 1e-8), rtol=0.02, atol=0
    )


def test_the_result_loads_without_our_code(mixtral):
    pruned = pruners.build({"name": "expert_neurons"})(
        problem(copy.deepcopy(mixtral), TOKENS, ratio=uniform(0.25, "model", loadable="stock"))
    )
    config = stock_config(pruned.model)
    assert config.intermediate_size == pruned.model.model.layers[1].mlp.experts.down_proj.shape[2]
    assert config.intermediate_size < 96


def test_it_loses_less_than_the_same_index_of_every_expert(mixtral):
    """Which is what any pruner does that knows nothing of experts."""
    whole = copy.deepcopy(mixtral)
    asked = problem(whole, TOKENS, criterion={"name": "taylor"}, ratio=uniform(0.5))
    pruners.build({"name": "oneshot", "kinds": ["neurons"]})(asked)
    own = run(mixtral, 0.5, score="taylor").model
    with torch.no_grad():
        dense, *others = (m(TOKENS).logits for m in (mixtral, own, whole))
    off = [float((o - dense).square().mean()) for o in others]
    assert off[0] < off[1]


def test_an_expert_without_tokens_is_ordered_by_its_weights(mixtral, caplog):
    model = copy.deepcopy(mixtral)
    with torch.no_grad():  # no token picks what is always asked for least
        gate = model.model.layers[0].mlp.gate.weight
        gate[3] = -100 * gate[[0, 1, 2, 4]].mean(0)
        held = model.model.layers[0].mlp.experts
        held.down_proj[3, :, 5] = 30
    seen = expert_inputs(model, fused_of(model), ModelRun(model, TOKENS), True)["experts.0"]
    idle = int(seen.tokens.argmin())
    seen.inside[idle] = 0
    run_ = ModelRun(model, TOKENS)
    run_.statistics["expert inputs", "experts.0", True] = seen
    found = neuron_scores(model, fused_of(model), [], run_, "wanda_sp", True)["neurons.0"]
    weights = held.gate_up_proj[idle].square().sum(1).view(2, -1).sum(0)
    weights = weights + held.down_proj[idle].square().sum(0)
    assert found[idle].argsort().tolist() == weights.argsort().tolist()
    assert found[idle].max() < found[[e for e in range(5) if e != idle]].min()
    assert "no token reached 1 experts" in caplog.text


@pytest.mark.parametrize("score", ["wanda_sp", "taylor", "magnitude"])
def test_experts_in_a_list_lose_their_own_neurons_too(score):
    torch.manual_seed(0)
    model = ListedMixtral().eval()
    pruned = run(model, 0.2, score=score)
    assert len(pruned.kept) == 15
    masks = [pruned.kept[f"neurons.0.e{e}"] for e in range(5)]
    assert {int(m.sum()) for m in masks} == {48}
    assert not all(torch.equal(m, masks[0]) for m in masks)
    if score == "magnitude":
        w = model.layers[0].experts[2]
        sizes = w.w1.weight.square().sum(1) + w.w3.weight.square().sum(1)
        sizes = sizes + w.w2.weight.square().sum(0)
        assert sizes[masks[2]].min() > sizes[~masks[2]].max()


def test_nothing_goes_at_ratio_zero(mixtral):
    pruned = run(mixtral, 0.0)
    for a, b in zip(mixtral.parameters(), pruned.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_model_without_experts_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="no experts"):
        check("expert_neurons", problem(tiny_model("llama"), ratio=uniform(0.2)))
    asked = problem(tiny_model("mixtral"), ratio=uniform(0.2, ranking="global"))
    with pytest.raises(ConfigError, match="ranking=local"):
        check("expert_neurons", asked)
