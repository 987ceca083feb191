"""Scores of experts: a plain reference for two routers, relations between the scores, the schedule
of blocks, and what cannot be scored.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from foreign import ListedMixtral
from problems import problem, uniform
from tiny_models import tiny_model

from prunekit import graph
from prunekit.activations.runs import ModelRun
from prunekit.checkpoint.stock_config import stock_config
from prunekit.criteria.aimer import aimer
from prunekit.criteria.experts import experts
from prunekit.errors import ConfigError
from prunekit.graph.discovery import discovery
from prunekit.graph.groups import Cut
from prunekit.graph.verification import masked_logits
from prunekit.registry import pruners
from prunekit.scoring.experts import routed
from prunekit.types import Group

NAMES = ("reap", "frequency", "weighted_frequency", "ean_sum", "ean_mean", "msan")
NAMES += ("weighted_ean_sum", "max_activation")


def groups_of(model):
    return [g for g in graph.discover(model) if g.kind == "experts"]


def scores(model, tokens, *names):
    run = ModelRun(model, tokens)
    return [experts(model, groups_of(model), run, score=name) for name in names]


def softmax_weights(moe, x):
    """Mixtral: of all experts, then of the two picked ones."""
    p = F.linear(x, moe.gate.weight).softmax(-1)
    value, index = p.topk(2, dim=-1)
    return index, value / value.sum(-1, keepdim=True)


def sigmoid_weights(moe, x):
    """DeepSeek-V3: a bias that only chooses, sigmoids that weigh, a factor."""
    p = F.linear(x, moe.gate.weight).sigmoid()
    index = (p + moe.gate.e_score_correction_bias).topk(2, dim=-1)[1]
    value = p.gather(1, index)
    return index, value / value.sum(-1, keepdim=True) * moe.gate.routed_scaling_factor


def plain(moe, x, weights):
    """What every score should be, expert by expert."""
    index, value = weights(moe, x)
    rows = []
    for e in range(moe.experts.num_experts):
        token, place = (index == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], moe.experts.gate_up_proj[e]).chunk(2, -1)
        f = F.linear(F.silu(gate) * up, moe.experts.down_proj[e])
        g, norm, n = value[token, place], f.norm(dim=-1), max(1, len(token))
        highest = float(f.abs().max()) if len(token) else 0.0
        row = [(g * norm).sum() / n, len(token), g.sum(), norm.sum(), norm.sum() / n]
        row += [norm.square().sum() / n, (g * norm).sum(), highest]
        rows.append(torch.tensor([float(v) for v in row]))
    return torch.stack(rows, 1)


@pytest.mark.parametrize(
    ("name", "weights"), [("mixtral", softmax_weights), ("deepseek_v3", sigmoid_weights)]
)
def test_every_score_is_that_of_a_plain_loop(name, weights, tokens):
    model = tiny_model(name)
    moe = model.model.layers[1].mlp
    if name == "deepseek_v3":
        moe.gate.e_score_correction_bias.copy_(torch.linspace(0, 0.4, 5))
    seen = []
    moe.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 64)))
    found = scores(model, tokens, *NAMES)
    with torch.no_grad():
        expected = plain(moe, seen[-1], weights)  # discovery's copies were heard before
    for i, s in enumerate(found):
        torch.testing.assert_close(s["experts.1"], expected[i], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_moe", "dbrx", "gpt_oss", "zaya", "longcat_flash"])
def test_scores_of_one_pass_agree_with_each_other(name, tokens):
    """On softmax before and after the choice, weights in two axes, biases, and experts without
    weights.
    """
    model = tiny_model(name)
    by = dict(zip(NAMES, scores(model, tokens, *NAMES), strict=True))
    for g in groups_of(model):
        n = by["frequency"][g.name]
        assert n.sum() > 0
        for mean, total in (("reap", "weighted_ean_sum"), ("ean_mean", "ean_sum")):
            torch.testing.assert_close(by[mean][g.name] * n, by[total][g.name])
        assert (by["msan"][g.name] >= by["ean_mean"][g.name] ** 2 * (1 - 1e-5)).all()


@pytest.mark.parametrize(
    ("name", "whole"), [("mixtral", True), ("qwen3_moe", True), ("jetmoe", True), ("olmoe", False)]
)
def test_picks_and_weights_add_up_over_the_experts(name, whole, tokens):
    """Two picks a token, whose weights are one where the router makes them so, and no expert puts
    out less than its largest element.
    """
    model = tiny_model(name, **({"norm_topk_prob": True} if name == "qwen3_moe" else {}))
    by = dict(zip(NAMES, scores(model, tokens, *NAMES), strict=True))
    for g in groups_of(model):
        n, weight = by["frequency"][g.name], by["weighted_frequency"][g.name]
        assert n.sum() == 2 * tokens.numel()
        assert (weight.sum() == pytest.approx(tokens.numel(), rel=1e-5)) == whole
        assert (by["reap"][g.name] <= by["ean_mean"][g.name]).all()
        assert (by["weighted_ean_sum"][g.name] <= by["ean_sum"][g.name]).all()
        assert (by["max_activation"][g.name] <= by["ean_sum"][g.name]).all()


def test_experts_in_a_list_are_scored_without_being_told_their_routing():
    """Mixtral as first released: its experts are called one by one with tokens alone."""
    torch.manual_seed(0)
    model = ListedMixtral().eval()
    tokens = torch.randint(8, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    before = model(tokens)
    seen, layer = [], model.layers[1]
    hook = layer.post_attention_layernorm.register_forward_hook(
        lambda m, args, out: seen.append(out.detach().flatten(0, 1))
    )
    found = scores(model, tokens, *NAMES)
    hook.remove()
    x = seen[-1]
    value, index = F.linear(x, layer.gate.weight).softmax(-1).topk(2, dim=-1)
    value = value / value.sum(-1, keepdim=True)
    by = dict(zip(NAMES, found, strict=True))
    with torch.no_grad():
        for e, expert in enumerate(layer.experts):
            token, place = (index == e).nonzero(as_tuple=True)
            norm = expert(x[token]).norm(dim=-1)
            assert by["frequency"]["experts.1"][e] == len(token)
            torch.testing.assert_close(
                by["weighted_ean_sum"]["experts.1"][e].float(), (value[token, place] * norm).sum()
            )
            torch.testing.assert_close(by["ean_sum"]["experts.1"][e].float(), norm.sum())
    assert torch.equal(model(tokens), before)


def test_an_expert_that_puts_out_more_scores_that_much_more(tokens):
    model = tiny_model("mixtral")
    (before,) = scores(model, tokens, "reap")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] *= 3
    (after,) = scores(model, tokens, "reap")
    torch.testing.assert_close(after["experts.1"][2], 3 * before["experts.1"][2])
    torch.testing.assert_close(after["experts.0"], before["experts.0"])


def test_the_forward_goes_on_as_if_nobody_looked(tokens):
    model = tiny_model("mixtral")
    before = model(tokens).logits
    scores(model, tokens, "reap")
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=0)


def test_experts_without_a_token_are_named(tokens, caplog):
    model = tiny_model("deepseek_v3")
    model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -100
    with caplog.at_level(logging.WARNING, "prunekit"):
        (found,) = scores(model, tokens, "ean_mean")
    assert found["experts.1"][3] == 0
    assert "1 of 5 experts got no calibration token (experts.1: 1)" in caplog.text


@pytest.mark.parametrize("pruner", ["oneshot", "layerwise"])
def test_the_lowest_experts_go_and_the_model_runs(pruner, tokens):
    model = tiny_model("mixtral")
    asked = problem(model, tokens, criterion={"name": "experts"}, ratio=uniform(0.4))
    pruned = pruners.build({"name": pruner, "kinds": ["experts"]})(asked)
    for name, kept in pruned.kept.items():
        assert int(kept.sum()) == 3
        assert pruned.scores[name][kept].min() >= pruned.scores[name][~kept].max()
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == 3
    assert model.model.layers[0].mlp.experts.num_experts == 3
    assert torch.isfinite(model(tokens).logits).all()


def test_blocks_are_scored_on_what_the_pruned_ones_put_out(tokens):
    model = tiny_model("mixtral")
    dense = copy.deepcopy(model)
    asked = problem(model, tokens, criterion={"name": "experts"}, ratio=uniform(0.4))
    pruned = pruners.build({"name": "layerwise", "kinds": ["experts"]})(asked)
    graph.remove(dense, {"experts.0": pruned.kept["experts.0"]})
    (expected,) = scores(dense, tokens, "reap")
    torch.testing.assert_close(pruned.scores["experts.1"], expected["experts.1"])
    (first,) = scores(tiny_model("mixtral"), tokens, "reap")
    assert not torch.allclose(first["experts.1"], expected["experts.1"])


@pytest.mark.parametrize("pruner", ["oneshot", "layerwise"])
def test_notes_say_how_many_tokens_the_scores_rest_on(pruner, tokens):
    model = tiny_model("deepseek_v3")
    model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -100
    asked = problem(model, tokens, criterion={"name": "experts"}, ratio=uniform(0.2))
    pruned = pruners.build({"name": pruner, "kinds": ["experts"]})(asked)
    assert pruned.notes["experts_seen"]["experts.1"] == {"unseen": 1, "fewest": 0}
    assert not pruned.kept["experts.1"][3]


GROUPED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}


def test_a_router_that_picks_groups_first_loses_the_same_number_of_each(tokens):
    """Removed, scored and loaded as a smaller model of its class; masked is the same as removed."""
    model = tiny_model("deepseek_v3", **GROUPED)
    found = discovery(model)
    [group] = groups_of(model)
    assert group.units == 4
    assert found.least[group.name] == 2
    (frequency,) = scores(model, tokens, "frequency")
    picks = []
    gate = model.model.layers[1].mlp.gate
    hook = gate.register_forward_hook(lambda m, args, out: picks.append(out[2]))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    expected = torch.bincount(picks[0].flatten(), minlength=8).view(2, 4).sum(0)
    assert frequency[group.name].tolist() == expected.tolist()
    kept = {group.name: torch.tensor([True, False, True, True])}
    cuts = [Cut.everywhere(c, kept[group.name]) for c in found.candidates if c.group is group]
    masked = masked_logits(model, {"input_ids": tokens}, cuts, found.skip)
    graph.remove(model, kept)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.shape == (6,)
    torch.testing.assert_close(model(tokens).logits, masked, rtol=1e-4, atol=1e-4)
    assert stock_config(model).n_routed_experts == 6


def test_what_is_no_expert_is_refused(tokens):
    model = tiny_model("mixtral")
    other = [g for g in graph.discover(model) if g.kind == "heads"]
    with pytest.raises(ConfigError, match=r"heads\.0 is of kind heads"):
        experts(model, other, ModelRun(model, tokens))
    with pytest.raises(ConfigError, match=r"heads\.0 is of kind heads"):
        aimer(model, other, ModelRun(model, tokens))


def test_the_routing_is_told_by_types_and_shapes():
    index, weight = torch.zeros(6, 2, dtype=torch.int64), torch.ones(6, 2)
    x = torch.ones(6, 8)
    assert routed(None, (x, index, weight), {}).at == (1, 2)
    assert routed(None, (x, weight), {"picks": index}).at == ("picks", 1)
    assert routed(None, (x, weight), {}) is None


def test_aimer_is_one_for_equal_sizes_and_free_of_scale(tokens):
    model = tiny_model("mixtral")
    run = ModelRun(model, tokens)
    held = model.model.layers[0].mlp.experts
    before = aimer(model, groups_of(model), run)["experts.0"]
    flat = torch.cat([held.gate_up_proj[1].flatten(), held.down_proj[1].flatten()]).detach()
    plain = -flat.abs().mean() / flat.square().mean().sqrt()
    torch.testing.assert_close(before[1], plain)
    with torch.no_grad():
        held.gate_up_proj[0] = 0.5 * held.gate_up_proj[0].sign()
        held.down_proj[0] = 0.5 * held.down_proj[0].sign()
        for w in (held.gate_up_proj, held.down_proj):
            w[1] *= 7
    after = aimer(model, groups_of(model), run)["experts.0"]
    assert after[0] == pytest.approx(-1)
    torch.testing.assert_close(after[1:], before[1:])


def test_aimer_reads_listed_experts():
    model = torch.nn.Module()
    model.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
    model.gate = torch.nn.Linear(4, 2, bias=False)
    paths = ("experts.0", "experts.1")
    group = Group("experts.0", "experts", 0, 2, modules=paths)
    found = aimer(model, [group], None)["experts.0"]
    w = model.experts[1].weight.detach()
    torch.testing.assert_close(found[1], -w.abs().mean() / w.square().mean().sqrt())


def test_aimer_takes_an_expert_of_zeros_first(tokens):
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(model.model.layers[0].mlp.experts, name)[3] = 0
    found = aimer(model, groups_of(model), ModelRun(model, tokens))["experts.0"]
    assert int(found.argmin()) == 3
    assert float(found[3]) == -1
