"""Whole blocks of a Llama-shaped model, and what is left without some of them."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

from prunekit.types import Group


def blocks(model: nn.Module, start: int = 0, stop: int | None = None) -> Group:
    """The group of the blocks from `start` up to `stop`."""
    names = tuple(f"model.layers.{i}" for i in range(len(model.model.layers)))[start:stop]
    return Group("blocks", "blocks", None, len(names), modules=names)


def lacking(model: nn.Module, gone: Collection[int]) -> nn.Module:
    """A copy that physically lacks these blocks."""
    small = copy.deepcopy(model)
    small.model.layers = torch.nn.ModuleList(
        [b for i, b in enumerate(small.model.layers) if i not in gone]
    )
    small.config.num_hidden_layers = len(small.model.layers)
    return small


def make_identity(block: nn.Module) -> None:
    """A block whose sub-layers add nothing."""
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()


def hidden_states(model: nn.Module, tokens: Tensor) -> Tensor:
    """(L + 1, N, T, C): the input of every block and the output of the last one, before the final
    norm.
    """
    seen = []
    hooks = [
        b.register_forward_pre_hook(lambda _m, a: seen.append(a[0])) for b in model.model.layers
    ]
    hooks.append(model.model.layers[-1].register_forward_hook(lambda _m, _a, out: seen.append(out)))
    with torch.no_grad():
        model(tokens)
    for h in hooks:
        h.remove()
    return torch.stack(seen)
