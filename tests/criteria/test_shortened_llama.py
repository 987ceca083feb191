"""Scores of whole blocks against the papers' formulas on gradients and smaller models."""

from __future__ import annotations

import pytest
import torch
from blocks import blocks, lacking
from reference import tiny_llama
from tiny_models import tiny_model

from prunekit.activations.runs import ModelRun, mean_loss
from prunekit.criteria.shortened_llama import block_magnitude, block_ppl, block_taylor

L = 6


@pytest.fixture
def model():
    return tiny_llama(num_hidden_layers=L)


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_is_the_sum_over_a_block(model, tokens, p):
    want = [sum((w.abs() ** p).sum() for w in b.parameters()) for b in model.model.layers]
    got = block_magnitude(model, [blocks(model)], ModelRun(model, tokens), p=p)["blocks"]
    torch.testing.assert_close(got, torch.stack(want).detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch", [None, 3])
def test_taylor_is_the_sum_of_w_times_gradient(model, tokens, batch):
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    want = torch.stack(
        [sum((w * w.grad).abs().sum() for w in b.parameters()) for b in model.model.layers]
    ).detach()
    model.zero_grad()
    got = block_taylor(model, [blocks(model)], ModelRun(model, tokens), batch=batch)["blocks"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("batch", [4, 3])
def test_ppl_is_that_of_a_model_without_the_block(model, tokens, reuse, batch):
    got = block_ppl(
        model, [blocks(model, 1, 5)], ModelRun(model, tokens), batch=batch, reuse=reuse
    )["blocks"]
    with torch.no_grad():
        want = [
            lacking(model, {i})(input_ids=tokens, labels=tokens, use_cache=False).loss
            for i in range(1, 5)
        ]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-6)
    assert all(
        "forward" not in vars(b) and not b._forward_hooks and not b._forward_pre_hooks
        for b in model.model.layers
    )


@pytest.mark.parametrize("reuse", [True, False])
def test_what_a_config_adds_for_the_router_is_no_part_of_the_loss(tokens, reuse):
    model, tokens = tiny_model("qwen3_moe", layers=3), tokens % 60 + 3
    group, run = blocks(model), ModelRun(model, tokens)
    want = block_ppl(model, [group], run, reuse=reuse)["blocks"], mean_loss(run)
    model.config.output_router_logits = True
    got = block_ppl(model, [group], run, reuse=reuse)["blocks"], mean_loss(run)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("by_block", [False, True])
def test_a_weight_that_blocks_share_counts_in_each(model, tokens, by_block):
    layers = model.model.layers
    layers[4].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
    model(input_ids=tokens, labels=tokens).loss.backward()
    want = [sum((w * w.grad).abs().sum() for w in b.parameters()) for b in layers]
    model.zero_grad()
    run = ModelRun(model, tokens)
    got = block_taylor(model, [blocks(model)], run, by_block=by_block)["blocks"]
    torch.testing.assert_close(got, torch.stack(want).detach(), rtol=1e-4, atol=1e-6)
