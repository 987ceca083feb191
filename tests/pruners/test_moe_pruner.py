"""Wanda inside experts with the router's weight: a plain loop, counts, patterns, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from foreign import ListedMixtral, ListedSigmoid
from other_device import DEVICE, other_device
from problems import check, problem, uniform
from tiny_models import tiny_model

from prunekit import graph
from prunekit.errors import ConfigError
from prunekit.pruners.moe_pruner import Stack, stack_mask
from prunekit.registry import pruners
from prunekit.scoring.expert_inputs import ExpertInputs, fused_experts
from prunekit.scoring.listed_experts import linear_squares

TOKENS = torch.randint(8, 100, (6, 16), generator=torch.Generator().manual_seed(0))
HALF = uniform(0.5, "prunable")


@pytest.fixture(scope="module")
def mixtral():
    return tiny_model("mixtral")


def run(model, ratio=HALF, **options):
    pruned = copy.deepcopy(model)
    return pruners.build({"name": "moe_pruner", **options})(problem(pruned, TOKENS, ratio=ratio))


def lowest_gone(weight, norm):
    """(outputs, inputs) without half of each row."""
    score = weight.abs() * norm
    order = score.argsort(dim=1, stable=True)[:, : weight.shape[1] // 2]
    return weight.scatter(1, order, 0)


@pytest.mark.parametrize("weighted", [True, False])
@torch.no_grad()
def test_the_first_block_is_that_of_a_plain_loop(mixtral, weighted):
    seen, mlp = [], mixtral.model.layers[0].mlp
    hook = mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 64)))
    mixtral(TOKENS)
    hook.remove()
    x, held = seen[0], mlp.experts
    value, index = F.linear(x, mlp.gate.weight).softmax(-1).topk(2, dim=-1)
    value = value / value.sum(-1, keepdim=True)
    pruned = run(mixtral, weighted=weighted).model.model.layers[0].mlp.experts
    for e in range(5):
        token, place = (index == e).nonzero(as_tuple=True)
        g = value[token, place, None] if weighted else 1
        gate, up = F.linear(x[token], held.gate_up_proj[e]).chunk(2, -1)
        first, second = (
            lowest_gone(w, (g * a).norm(dim=0))
            for w, a in (
                (held.gate_up_proj[e], x[token]),
                (held.down_proj[e], F.silu(gate) * up),
            )
        )
        torch.testing.assert_close(pruned.gate_up_proj[e], first, rtol=0, atol=0)
        torch.testing.assert_close(pruned.down_proj[e], second, rtol=0, atol=0)


def test_the_host_waits_once_for_the_tokens_of_all_experts(mixtral):
    f = fused_experts(mixtral, graph.discover(mixtral, verify=False))[0]
    stack, width = Stack(f, *f.writer), mixtral.config.hidden_size
    entering, inside = torch.rand(f.experts, width), torch.rand(f.experts, f.neurons.units)
    tokens = torch.tensor([3.0, 0.0, 1.0, 2.0, 5.0])
    expected = stack_mask(
        mixtral, stack, ExpertInputs(tokens, entering, inside), 1000, "matrix", None
    )
    there = copy.deepcopy(mixtral)
    with other_device() as waits:
        there.to(DEVICE)
        seen = ExpertInputs(*(x.to(DEVICE) for x in (tokens, entering, inside)))
        found = stack_mask(there, stack, seen, 1000, "matrix", None)
        assert sum(waits.values()) == 1
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("kind", [ListedMixtral, ListedSigmoid])
@torch.no_grad()
def test_experts_in_a_list_are_those_of_a_plain_loop(kind):
    """The shared expert stays."""
    torch.manual_seed(0)
    model = kind().eval()
    seen, layer = [], model.layers[0]
    hook = layer.post_attention_layernorm.register_forward_hook(
        lambda m, args, out: seen.append(out.flatten(0, 1))
    )
    model(TOKENS % 97)
    hook.remove()
    logits = layer.gate(seen[0])
    if kind is ListedMixtral:
        value, index = logits.softmax(-1).topk(2, dim=-1)
        value = value / value.sum(-1, keepdim=True)
    else:
        index = (logits.sigmoid() + layer.correction).topk(2, dim=-1)[1]
        value = 1.5 * logits.sigmoid().gather(1, index)
    asked = problem(copy.deepcopy(model), TOKENS % 97, ratio=HALF)
    pruned = pruners.build({"name": "moe_pruner"})(asked)
    assert len(pruned.kept) == 3 * 5 * 3
    for e, (old, new) in enumerate(zip(layer.experts, pruned.model.layers[0].experts, strict=True)):
        token, place = (index == e).nonzero(as_tuple=True)
        x, g = seen[0][token], value[token, place, None]
        a = F.silu(old.w1(x)) * old.w3(x)
        for before, after, read in ((old.w1, new.w1, x), (old.w3, new.w3, x), (old.w2, new.w2, a)):
            expected = lowest_gone(before.weight, (g * read).norm(dim=0))
            torch.testing.assert_close(after.weight, expected, rtol=0, atol=0)
    if kind is ListedSigmoid:
        shared = (m.layers[0].shared.w1.weight for m in (model, pruned.model))
        assert torch.equal(*shared)


@pytest.mark.parametrize("name", ["gpt_oss", "dbrx"])
def test_every_output_of_every_expert_loses_half(name):
    """Matrices that are transposed, and such as are stacked in two axes."""
    model = tiny_model(name)
    pruned = run(model)
    assert pruned.kept
    for g in pruned.groups:
        t = pruned.model.get_parameter(g.matrix)
        assert int((t == 0).sum()) == g.units // 2
        assert torch.equal(t != 0, pruned.kept[g.name])
        assert torch.equal(t[t != 0], model.get_parameter(g.matrix)[t != 0])
    others = {n for n, _ in model.named_parameters()} - {g.matrix for g in pruned.groups}
    for n in others:
        assert torch.equal(model.get_parameter(n), pruned.model.get_parameter(n))


def test_two_of_four_consecutive_inputs_stay(mixtral):
    down = run(mixtral, pattern="2:4").model.model.layers[1].mlp.experts.down_proj
    assert ((down != 0).view(5, 64, -1, 4).sum(-1) == 2).all()


def test_nothing_goes_at_ratio_zero(mixtral):
    pruned = run(mixtral, uniform(0.0, "prunable"))
    for a, b in zip(mixtral.parameters(), pruned.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_not_finite_is_refused_by_name(mixtral, monkeypatch):
    """A choice among numbers that are none would leave everything where it is."""
    monkeypatch.setattr(ExpertInputs, "add", lambda self, *_: self.inside.fill_(torch.nan))
    with pytest.raises(ConfigError, match=r"scores of weights\.0\.experts\.\w+ are not finite"):
        run(mixtral)
    squares = linear_squares

    def infinite(*args):
        return {name: found * torch.inf for name, found in squares(*args).items()}

    monkeypatch.setattr("prunekit.pruners.moe_pruner.linear_squares", infinite)
    torch.manual_seed(0)
    asked = problem(ListedMixtral().eval(), TOKENS % 97, ratio=HALF)
    with pytest.raises(ConfigError, match=r"scores of layers\.0\.experts\.0\.w1 are not finite"):
        pruners.build({"name": "moe_pruner"})(asked)


def test_what_cannot_be_is_refused_before_anything_runs(mixtral):
    with pytest.raises(ConfigError, match="has no experts"):
        check("moe_pruner", problem(tiny_model("llama"), ratio=HALF))
    with pytest.raises(ConfigError, match="do not divide"):
        check("moe_pruner", problem(mixtral, ratio=HALF), pattern="2:5")
    with pytest.raises(ConfigError, match=r"pattern=1:4 removes 0\.75 of each matrix"):
        check("moe_pruner", problem(mixtral, ratio=HALF), pattern="1:4")
    with pytest.raises(ConfigError, match="N:4 takes nothing"):
        check("moe_pruner", problem(mixtral, ratio=uniform(0.05, "prunable")), pattern="N:4")
    with pytest.raises(ConfigError, match=r"no matrix of a linear module"):
        check("moe_pruner", problem(mixtral, ratio={"name": "besa", "per": "matrix"}))
    with pytest.raises(ConfigError, match=r"gives each row one of its own"):
        check("moe_pruner", problem(ListedMixtral(), ratio={"name": "besa"}))
