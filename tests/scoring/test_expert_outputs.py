"""What every expert puts out for every token, and how alike a router picks them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from prunekit import graph
from prunekit.activations.hooks import hook_activations
from prunekit.activations.runs import ModelRun
from prunekit.scoring.expert_outputs import expert_outputs


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss"])  # gpt_oss: routers with a bias
def test_the_routing_is_that_of_the_router_itself(arch, tokens):
    model, tokens = tiny_model(arch), tokens % 60 + 3
    [group] = [g for g in graph.discover(model) if g.name == "experts.0"]
    path = group.members[0].param.rpartition(".")[0]
    router, read = model.get_submodule(path), []
    with hook_activations(model, {path: lambda x: read.append(x.reshape(-1, x.shape[-1]))}):
        model(input_ids=tokens)
    logits = torch.nn.functional.linear(read[0], router.weight, getattr(router, "bias", None))
    found = expert_outputs(model, group, ModelRun(model, tokens))
    torch.testing.assert_close(found.routing, logits.T @ logits, rtol=1e-4, atol=1e-4)
