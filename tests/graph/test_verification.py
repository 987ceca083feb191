"""What a proof refuses: units that do not matter, removal that is not quite zeroing; and what it
leaves as it is: sizes that equal a width by chance.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from prunekit.graph.discovery import find_candidates
from prunekit.graph.module_sizes import Setting
from prunekit.graph.sample_run import inputs_for
from prunekit.graph.small_model import randomised
from prunekit.graph.verification import UNMOVED, Verdict, prove


def proof(model: nn.Module, kind: str) -> Verdict:
    """The one verdict on the units of a kind, on this very model."""
    _, found = find_candidates(model, each=2)
    units = [c for c in found.candidates if c.group.kind == kind]
    (verdict,) = prove(model, inputs_for(model), units, found.skip).values()
    return verdict


class Block(nn.Module):
    """A feed-forward of as many neurons as the residual stream has channels."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 24), nn.Linear(24, 24)
        self.width, self.channels = 24, 24
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu().view(*x.shape[:-1], self.width)
        return x + self.down(h) * (24 / h.shape[-1]) ** self.scale


class Network(nn.Module):
    """Two blocks whose output grows, as `scale` says, where they become narrower."""

    def __init__(self, scale: float = 0.0) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 24), nn.Linear(24, 64)
        self.blocks = nn.ModuleList(Block(scale) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def network(scale: float) -> nn.Module:
    torch.manual_seed(0)
    return randomised(Network(scale).eval())


def test_units_that_move_nothing_are_not_proven(llama: nn.Module) -> None:
    assert proof(llama, "neurons").recipe is not None
    idle = copy.deepcopy(llama)
    for block in idle.model.layers:
        nn.init.zeros_(block.mlp.down_proj.weight)
    verdict = proof(idle, "neurons")
    assert (verdict.recipe, verdict.reason, verdict.moved) == (None, UNMOVED, False)


def test_removal_that_is_off_by_a_thousandth_is_refused() -> None:
    assert proof(network(0.0), "neurons").recipe is not None
    verdict = proof(network(0.005), "neurons")
    assert verdict.recipe is None
    reason, _, off = verdict.reason.rpartition(" by ")
    assert reason == "removal differs from zeroing"
    assert 1e-4 < float(off) < 5e-3


def test_a_size_that_equals_the_width_by_chance_stays() -> None:
    recipe = proof(network(0.0), "neurons").recipe
    assert recipe is not None
    assert recipe.attributes == {Setting("Block", "width")}
