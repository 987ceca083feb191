"""The run of least angle against the formula on stored hidden states."""

from __future__ import annotations

import math

import pytest
import torch
from blocks import blocks, hidden_states
from reference import tiny_llama

from prunekit.activations.runs import ModelRun
from prunekit.criteria.angular import angular
from prunekit.selection.units import without
from prunekit.types import Group

L = 6


@pytest.fixture
def model():
    return tiny_llama(num_hidden_layers=L)


@pytest.mark.parametrize("n", range(1, L + 1))
@pytest.mark.parametrize("tokens_used", ["last", "all"])
def test_angular_takes_exactly_the_run_of_least_angle(model, tokens, n, tokens_used):
    x = hidden_states(model, tokens)
    x = x[:, :, -1] if tokens_used == "last" else x.flatten(1, 2)
    d = [
        torch.arccos(torch.cosine_similarity(x[i], x[i + n], dim=-1)).mean() / math.pi
        for i in range(L + 1 - n)
    ]
    best = int(torch.stack(d).argmin())
    run = ModelRun(model, tokens, {"blocks": n})
    scores = angular(model, [blocks(model)], run, tokens=tokens_used)["blocks"]
    gone = (~without(scores, n)).nonzero()[:, 0].tolist()
    assert gone == list(range(best, best + n))
    torch.testing.assert_close(scores[best], d[best], rtol=1e-5, atol=1e-6)


def test_one_block_by_angle_is_one_block_by_last_token_influence(model, tokens):
    """arccos is monotone, so with one sample the two rank alike (card 5's check)."""
    one = tokens[:1]
    x = hidden_states(model, one)[:, 0, -1]
    influence = torch.stack([1 - torch.cosine_similarity(x[i], x[i + 1], dim=-1) for i in range(L)])
    angles = angular(model, [blocks(model)], ModelRun(model, one, {"blocks": 1}))["blocks"]
    assert int(angles.argmin()) == int(influence.argmin())
    assert (angles.frac().argsort() == influence.argsort()).all()


def test_the_simple_variant_keeps_the_last_block(model, tokens):
    scores = angular(model, [blocks(model)], ModelRun(model, tokens, {"blocks": 3}), choice="last")[
        "blocks"
    ]
    assert (~without(scores, 3)).nonzero()[:, 0].tolist() == [2, 3, 4]


def test_the_simple_variant_spares_the_last_block_once(model, tokens):
    """Where the exclusion left it out already, the run ends with the block before it."""
    group = blocks(model, 1, L - 1)
    run = ModelRun(model, tokens, {"blocks": 2})
    scores = angular(model, [group], run, choice="last")["blocks"]
    gone = [group.modules[i] for i in (~without(scores, 2)).nonzero()[:, 0].tolist()]
    assert gone == [f"model.layers.{i}" for i in (L - 3, L - 2)]


def test_angular_stays_inside_what_the_exclusion_left(model, tokens):
    group = blocks(model, 2, 5)
    x = hidden_states(model, tokens)[:, :, -1]
    d = [torch.arccos(torch.cosine_similarity(x[i], x[i + 2], dim=-1)).mean() for i in (2, 3)]
    scores = angular(model, [group], ModelRun(model, tokens, {"blocks": 2}))["blocks"]
    first = int(torch.stack(d).argmin())
    assert (~without(scores, 2)).nonzero()[:, 0].tolist() == [first, first + 1]


@pytest.mark.parametrize("choice", ["angular", "last"])
def test_angular_refuses_blocks_with_a_gap(model, tokens, choice):
    group = Group("blocks", "blocks", None, 2, modules=("model.layers.0", "model.layers.2"))
    with pytest.raises(ValueError, match=r"unbroken run"):
        angular(model, [group], ModelRun(model, tokens, {"blocks": 1}), choice=choice)
