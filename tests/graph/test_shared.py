"""Blocks that share parameters: their units are one group's, cut once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from prunekit.graph import discover, remove, zero
from prunekit.graph.small_model import randomised


class Block(nn.Module):
    def __init__(self, ffn: nn.Module, number: int) -> None:
        super().__init__()
        self.norm, self.ffn, self.number = nn.LayerNorm(24), ffn, number

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


class Shared(nn.Module):
    """Blocks 0 and 2 share their FFN, as Zamba's share a transformer; 1 and 3 have their own."""

    def __init__(self) -> None:
        super().__init__()
        ffns = [nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)) for _ in range(3)]
        self.embed, self.head = nn.Embedding(64, 24), nn.Linear(24, 64)
        self.blocks = nn.ModuleList(Block(ffns[k], i) for i, k in enumerate((0, 1, 0, 2)))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_shared_neurons_are_found_once_and_cut_once() -> None:
    torch.manual_seed(0)
    model = randomised(Shared().eval())
    groups = [g for g in discover(model) if g.kind == "neurons"]
    places = [(m.param, m.axis) for g in groups for m in g.members]
    assert len(groups) == 3
    assert len(set(places)) == len(places)
    kept = {g.name: torch.arange(40) % (i + 2) > 0 for i, g in enumerate(groups)}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        removed, zeroed = remove(copy.deepcopy(model), kept), zero(copy.deepcopy(model), kept)
        assert torch.allclose(removed(ids), zeroed(ids), rtol=1e-4, atol=1e-4)
        assert (model(ids) - zeroed(ids)).abs().max() > 1e-2
    assert removed.blocks[0].ffn is removed.blocks[2].ffn
