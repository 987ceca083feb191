"""Sums over what linear modules inside experts of a list read."""

from __future__ import annotations

import pytest
import torch
from foreign import ListedMixtral
from other_device import DEVICE, other_device

from prunekit import graph
from prunekit.activations.hooks import hook_activations
from prunekit.activations.runs import ModelRun
from prunekit.scoring.listed_experts import linear_squares, weighed


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


@pytest.mark.parametrize("experts", [2, 7])
def test_the_host_waits_once_for_the_weights_of_all_experts(experts):
    g = torch.Generator().manual_seed(0)
    f, weight = torch.randn(experts, 3, 4, generator=g), torch.rand(experts, 3, 1, generator=g)
    with other_device() as waits:
        outputs = [(e, x.to(DEVICE).requires_grad_()) for e, x in enumerate(f)]
        total = sum((weight[e].to(DEVICE) * x).sum() for e, x in outputs)
        calls = weighed(total, outputs)
        assert sum(waits.values()) == 1
        assert [c.expert for c in calls] == list(range(experts))
        for call, w in zip(calls, weight, strict=True):
            assert torch.equal(call.g.cpu(), w[:, 0])


def test_an_output_whose_channels_are_weighed_apart_tells_no_weights():
    outputs = [(e, torch.ones(3, 4, requires_grad=True)) for e in range(2)]
    apart = torch.tensor([1.0, 1.0, 1.0, 1.01])
    assert weighed(outputs[0][1].sum() + (apart * outputs[1][1]).sum(), outputs) == []
    assert len(weighed(sum(f.sum() for _, f in outputs), outputs)) == 2
