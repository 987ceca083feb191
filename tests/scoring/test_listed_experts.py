"""Sums over what linear modules inside experts of a list read."""

from __future__ import annotations

import pytest
import torch
from foreign import ListedMixtral

from prunekit import graph
from prunekit.activations.hooks import hook_activations
from prunekit.activations.runs import ModelRun
from prunekit.scoring.listed_experts import linear_squares


@pytest.mark.parametrize("weighted", [True, False])
def test_a_token_counts_times_the_square_of_its_routers_weight(tokens, weighted):
    torch.manual_seed(0)
    model, tokens = ListedMixtral().eval(), tokens % 97
    [group] = [g for g in graph.discover(model) if g.name == "experts.0"]
    layer, read = model.layers[0], []
    with torch.no_grad(), hook_activations(model, {"layers.0.gate": read.append}):
        model(tokens)
        value, index = layer.gate(read[0]).softmax(-1).topk(2, dim=-1)
    value = value / value.sum(-1, keepdim=True)
    token, place = torch.where(index == 3)
    scale = value[token, place, None] if weighted else 1.0
    want = (scale * read[0][token]).square().sum(0)
    names = {"layers.0.experts.3.w1": group}
    found = linear_squares(model, names, ModelRun(model, tokens), weighted)
    torch.testing.assert_close(found["layers.0.experts.3.w1"], want, rtol=1e-4, atol=1e-5)
