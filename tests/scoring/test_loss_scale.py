"""Gradients of float16 weights that are small are not zero."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunekit.activations.runs import ModelRun
from prunekit.scoring.block_gradients import backward_by_block
from prunekit.scoring.gradients import backward
from prunekit.scoring.lean_backward import _OneBufferLoss
from prunekit.scoring.loss_scale import loss_scale, unscaled


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Small(nn.Module):
    """Its output matrix lets hardly anything back."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(100, 16), nn.Linear(16, 100, bias=False)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        with torch.no_grad():
            self.head.weight.mul_(3e-5)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False, labels=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x).float()
        if labels is None:
            return logits
        return SimpleNamespace(loss=F.cross_entropy(logits[:, :-1].mT, labels[:, 1:]))


NAMES = ["layers.0.down.weight", "layers.0.norm.weight"]


def gradients_of(model, tokens, go, squares, names):
    found = {}

    def sink(name, weight, gradient, mean_squared):
        found[name] = [gradient.double(), *([mean_squared.double()] if squares else [])]

    go(model, names, ModelRun(model, tokens), sink, squares=squares)
    return found


@pytest.mark.parametrize("go", [backward, backward_by_block])
@pytest.mark.parametrize("squares", [False, True])
def test_they_are_those_of_the_same_weights_in_float32(go, squares, tokens):
    half = Small().half()
    expected = gradients_of(copy.deepcopy(half).float(), tokens, go, squares, NAMES)
    found = gradients_of(half, tokens, go, squares, NAMES)
    for name, values in expected.items():
        for value, want in zip(found[name], values, strict=True):
            assert (value - want).norm() < 0.1 * want.norm(), name


def test_only_float16_is_scaled():
    found = [loss_scale(Small().to(t)) for t in (torch.float32, torch.bfloat16, torch.float16)]
    assert found == [1, 1, 1024]
    g = torch.ones(2)
    assert unscaled(g, 1) is g


def test_small_probabilities_over_many_tokens_reach_the_logits():
    """A vocabulary of thousands: its mean over the tokens, in float16, would be zero."""
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(1, 512, 8192, generator=g).half(), torch.randint(8192, (1, 512))
    exact = logits.float().requires_grad_()
    (F.cross_entropy(exact[0, :-1], labels[0, 1:]) * 1024).backward()
    leaf = logits.requires_grad_()
    (_OneBufferLoss.apply(leaf.clone(), labels) * 1024).backward()
    rest = partial(torch.masked_fill, mask=F.one_hot(labels[0, 1:], 8192).bool(), value=0)
    small, want = rest(leaf.grad[0, :-1].float()), rest(exact.grad[0, :-1])
    assert (small - want).norm() < 0.01 * want.norm()
