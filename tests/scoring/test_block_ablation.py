"""Losses of models that lack a block, whatever its form."""

from __future__ import annotations

import torch

from prunekit.activations.runs import ModelRun
from prunekit.scoring.block_ablation import losses_without


def test_blocks_that_return_tuples(tokens):
    class Tupled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return (self.inner(x), None)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(101, 8)
            self.layers = torch.nn.ModuleList([Tupled(torch.nn.Linear(8, 8)) for _ in range(3)])

        def get_input_embeddings(self):
            return self.embed

        def forward(self, input_ids, labels=None, use_cache=None):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer(x)[0]
            return type("Out", (), {"loss": x.square().mean()})()

    torch.manual_seed(0)
    net = Net()
    names = [f"layers.{i}" for i in range(3)]
    run = ModelRun(net, tokens)
    torch.testing.assert_close(
        losses_without(net, names, run, 4), losses_without(net, names, run, 4, reuse=False)
    )
