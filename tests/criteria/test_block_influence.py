"""Block influence against equation 1 on stored hidden states."""

from __future__ import annotations

import pytest
import torch
from blocks import blocks, hidden_states, lacking, make_identity
from reference import tiny_llama

from prunekit.activations.moments import moments
from prunekit.activations.runs import ModelRun
from prunekit.criteria.block_influence import block_influence
from prunekit.errors import ConfigError

L = 6


@pytest.fixture
def model():
    return tiny_llama(num_hidden_layers=L)


@pytest.mark.parametrize("skip", [0, 3])
def test_block_influence_is_the_formula(model, tokens, skip):
    x = hidden_states(model, tokens)[:, :, skip:]
    want = [1 - torch.cosine_similarity(x[i], x[i + 1], dim=-1).mean() for i in range(L)]
    got = block_influence(model, [blocks(model)], ModelRun(model, tokens), skip=skip)["blocks"]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skip", [16, 99])
def test_a_skip_of_whole_samples_is_refused(model, tokens, skip):
    run = ModelRun(model, tokens)
    with pytest.raises(ConfigError, match=rf"skip={skip} leaves nothing .* possible: 0 to 15"):
        block_influence(model, [blocks(model)], run, skip=skip)
    with pytest.raises(ConfigError, match="leaves nothing"):
        moments(model, ["model.layers.0.mlp.down_proj"], run, skip)


def test_an_identity_block_has_no_influence_and_goes_first(model, tokens):
    make_identity(model.model.layers[3])
    got = block_influence(model, [blocks(model)], ModelRun(model, tokens))["blocks"]
    assert got[3].abs() < 1e-6
    assert int(got.argmin()) == 3
    with torch.no_grad():
        assert torch.equal(
            model(tokens).logits, lacking(model, {3})(tokens, use_cache=False).logits
        )
