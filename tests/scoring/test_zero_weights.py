"""Picks of weight zero, by which some routers skip an expert, count in no statistic of experts."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from prunekit import graph
from prunekit.activations.runs import ModelRun
from prunekit.scoring.expert_grams import expert_grams
from prunekit.scoring.expert_inputs import expert_inputs, fused_experts
from prunekit.scoring.experts import ExpertStatistics, expert_statistics


@pytest.fixture
def skipping(tokens):
    """A model whose router gives the second pick of every token the weight zero; the first picks
    are listed in its first block.
    """
    model, first = tiny_model("qwen3_moe"), []

    def skip(module, args, out):
        weight, index = out[-2].clone(), out[-1]
        weight[:, 1] = 0
        first.append(index[:, 0])
        return (*out[:-2], weight, index)

    model.model.layers[0].mlp.gate.register_forward_hook(skip)
    run = ModelRun(model, tokens % 60 + 3)
    model(input_ids=run.tokens)
    return model, run, first[0].bincount(minlength=5).double()


def test_no_statistic_counts_a_pick_of_weight_zero(skipping):
    model, run, picked = skipping
    groups = graph.discover(model)
    fused = [f for f in fused_experts(model, groups) if f.group.name == "experts.0"]
    found = expert_statistics(model, [fused[0].group], run)["experts.0"]
    assert torch.equal(found.frequency, picked)
    seen = expert_inputs(model, fused, run, weighted=False)["experts.0"]
    assert torch.equal(seen.tokens.double(), picked)
    grams = expert_grams(model, fused, [], run, weighted=False)[fused[0].neurons.name]
    assert [sum(f.tokens for f in folds) for folds in grams] == picked.tolist()


def test_experts_without_weights_of_their_own_count_for_none():
    found = ExpertStatistics.zeros(2, torch.device("cpu"))
    found.add(torch.tensor([0, 2, 1, 1]), torch.tensor([0.5, 0.5, 0.0, 0.25]), torch.ones(4, 9))
    assert found.frequency.tolist() == [1, 1]
    assert found.weight.tolist() == [0.5, 0.25]
    assert found.norm.tolist() == [3, 3]
    assert found.weighted_norm.tolist() == [1.5, 0.75]
