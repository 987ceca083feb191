"""Experts in one tensor whose code hands the routing to nobody, scored by watching which operations
read an expert's weights: plain references for two architectures and a foreign one, and what cannot
be followed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foreign import INNER, WIDTH, ListedMixtral, MixtralLayer
from problems import problem, uniform
from tiny_models import tiny_model
from torch import nn
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

from prunekit import graph
from prunekit.activations.runs import ModelRun
from prunekit.errors import ConfigError
from prunekit.registry import pruners
from prunekit.scoring.experts import expert_statistics
from prunekit.scoring.traced_experts import CutAtExperts

STATISTICS = ("frequency", "weight", "norm", "squared_norm", "weighted_norm", "maximum")


def statistics(model, tokens):
    groups = [g for g in graph.discover(model) if g.kind == "experts"]
    return expert_statistics(model, groups, ModelRun(model, tokens))


def same(found, experts):
    """`experts` has (outputs, weights) of each."""
    for e, (f, g) in enumerate(experts):
        n, peak = f.norm(dim=1), f.abs().max() if len(f) else torch.zeros(())
        plain = (torch.tensor(len(f)), g.sum(), n.sum(), (n**2).sum(), (g * n).sum(), peak)
        for name, expected in zip(STATISTICS, plain, strict=True):
            value = getattr(found, name)[e]
            torch.testing.assert_close(value, expected.double(), rtol=1e-4, atol=1e-5)


def heard(model, tokens, *modules):
    """Their arguments and outputs in one forward."""
    seen = {}

    def keep(module, args, out):
        seen[module] = (args, out)

    hooks = [m.register_forward_hook(keep) for m in modules]
    with torch.no_grad():
        logits = model(tokens)
    for hook in hooks:
        hook.remove()
    return [seen[m] for m in modules], logits


@pytest.mark.parametrize("name", ["experts.1", "experts.1.1"])
def test_jetmoes_experts_of_neurons_and_of_attention(name, tokens):
    """Of attention, the module around router and experts is never called itself."""
    model = tiny_model("jetmoe")
    found = statistics(model, tokens)
    layer = model.model.layers[1]
    moe = layer.mlp if name == "experts.1" else layer.self_attention.experts
    (routing, written), _ = heard(model, tokens, moe.router, moe.output_linear)
    (rows, sizes), gates = written[0], routing[1][2]
    outputs = [F.linear(x, w) for x, w in zip(rows.split(sizes), moe.output_linear.weight)]
    same(found[name], list(zip(outputs, gates.split(sizes), strict=True)))


def test_llama_4s_experts_hold_their_weight_already(tokens):
    """It multiplies what an expert reads with the sigmoid: the output counts with a weight of one,
    and tokens of other experts, which it runs as zeros, for none.
    """
    model = tiny_model("llama4_text")
    found = statistics(model, tokens)["experts.1"]
    moe = model.model.layers[1].feed_forward
    ([(args, _)], _) = heard(model, tokens, moe)
    x = args[0].flatten(0, 1)
    value, index = F.linear(x, moe.router.weight).topk(2, dim=-1)
    experts = []
    for e in range(5):
        token, place = (index == e).nonzero(as_tuple=True)
        read = x[token] * value[token, place, None].sigmoid()
        gate, up = (read @ moe.experts.gate_up_proj[e]).chunk(2, -1)
        experts.append(((F.silu(gate) * up) @ moe.experts.down_proj[e], torch.ones(len(token))))
    same(found, experts)


class StackedLayer(MixtralLayer):
    """Experts in one tensor, with biases, in the block's own forward."""

    def __init__(self):
        super().__init__()
        del self.experts
        count = self.num_experts
        self.w1 = nn.Parameter(torch.randn(count, INNER, WIDTH) / 7)
        self.w2 = nn.Parameter(torch.randn(count, WIDTH, INNER) / 7)
        self.b2 = nn.Parameter(torch.randn(count, WIDTH) / 7)

    def expert(self, e, x):
        return F.linear(F.gelu(F.linear(x, self.w1[e])), self.w2[e]) + self.b2[e]

    def forward(self, x):
        x = x + self.attend(self.input_layernorm(x))
        flat = self.post_attention_layernorm(x).flatten(0, 1)
        weights, chosen = torch.topk(self.gate(flat).softmax(-1), self.top_k, dim=-1)
        out = torch.zeros_like(flat)
        for e in chosen.unique().tolist():
            token, slot = torch.where(chosen == e)
            y = self.expert(e, flat[token])
            y *= weights[token, slot, None]  # in place: not what was watched
            out = out.index_add(0, token, y)
        return x + out.view_as(x)


class EveryExpertLayer(StackedLayer):
    """All experts run on all tokens, in one product."""

    def forward(self, x):
        x = x + self.attend(self.input_layernorm(x))
        flat = self.post_attention_layernorm(x).flatten(0, 1)
        value, chosen = torch.topk(self.gate(flat).softmax(-1), self.top_k, dim=-1)
        weights = torch.zeros(len(flat), self.num_experts).scatter(1, chosen, value)
        inner = F.gelu(torch.bmm(flat.expand(self.num_experts, -1, -1), self.w1.mT))
        y = torch.bmm(inner, self.w2.mT) + self.b2[:, None]
        return x + (y * weights.T[..., None]).sum(0).view_as(x)


class Stacked(ListedMixtral):
    layer = StackedLayer


class EveryExpert(ListedMixtral):
    layer = EveryExpertLayer


@pytest.mark.parametrize("kind", [Stacked, EveryExpert])
def test_foreign_blocks_with_biases(kind, tokens):
    torch.manual_seed(0)
    model, tokens = kind().eval(), tokens % 97
    found = statistics(model, tokens)
    layer = model.layers[1]
    ([(_, x)], before) = heard(model, tokens, layer.post_attention_layernorm)
    x = x.flatten(0, 1)
    value, index = F.linear(x, layer.gate.weight).softmax(-1).topk(2, dim=-1)
    with torch.no_grad():
        experts = [(layer.expert(e, x[(index == e).any(1)]), value[index == e]) for e in range(5)]
    same(found["experts.1"], experts)
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("pruner", ["oneshot", "layerwise"])
def test_the_lowest_experts_of_jetmoe_go(pruner, tokens):
    model = tiny_model("jetmoe")
    asked = problem(model, tokens, criterion={"name": "experts"}, ratio=uniform(0.4))
    pruned = pruners.build({"name": pruner, "kinds": ["experts"]})(asked)
    for name, kept in pruned.kept.items():
        assert int(kept.sum()) == 3
        assert pruned.scores[name][kept].min() >= pruned.scores[name][~kept].max()
    assert torch.isfinite(model(tokens).logits).all()


def test_copied_weights_cannot_be_followed(tokens, monkeypatch):
    def forward(self, inputs, expert_size):
        weight = self.weight.clone()
        parts = inputs.split(expert_size)
        return torch.cat([F.linear(x, w) for x, w in zip(parts, weight)])

    monkeypatch.setattr(JetMoeParallelExperts, "forward", forward)
    with pytest.raises(ConfigError, match=r"experts\.0.* take criterion=aimer or l2"):
        statistics(tiny_model("jetmoe"), tokens)


def test_what_is_of_several_experts_is_nobodys():
    w, x = torch.randn(3, 4, 5), torch.randn(3, 5)
    with CutAtExperts([w]) as cut:
        F.linear(x, w.flatten(0, 1))
        torch.einsum("tc,ekc->tek", x, w)  # as many tokens as experts
        assert not cut.outputs
        F.linear(x, w.mT[2].T)
    assert [e for e, _ in cut.outputs] == [2]
