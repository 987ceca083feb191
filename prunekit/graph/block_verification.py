"""The proof for whole blocks, on a small model: dropping one equals handing on its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import in_short
from prunekit.graph.block_lists import block_kinds, drop_blocks
from prunekit.graph.generation_check import cache_difference
from prunekit.graph.groups import Pattern
from prunekit.graph.masks import bypass, zero_block
from prunekit.graph.module_sizes import Recipe
from prunekit.graph.sample_run import ERRORS
from prunekit.graph.verification import MOVES, RANDOM, TOLERANCE, Verdict, duplicate, run
from prunekit.types import Group

BLOCKS: Pattern = ("blocks", frozenset())


def prove_blocks(
    model: nn.Module, inputs: dict[str, Any], blocks: Group, caches: bool = False
) -> Verdict:
    """Dropping any one block must equal zeroing all its parameters; or, where that is not the
    identity, handing on its input.

    With `caches` it must generate the same with a cache as without as well, unless the block is the
    last of its kind: classes may refuse a cache where, say, no attention is left.
    """
    dense = run(model, inputs)
    kinds = block_kinds(model, blocks.modules[0].rpartition(".")[0])
    if not torch.allclose(run(model, inputs), dense):
        return Verdict(None, RANDOM)
    by_zeros = True
    for i in range(blocks.units):
        small = _without(model, blocks, i)
        try:
            removed = run(small, inputs)
            passed, zeroed = _stood_in_for(model, inputs, blocks.modules[i])
        except ERRORS as e:
            return Verdict(None, f"without block {i}: {in_short(e, 100)}")
        scale = max(1.0, float(removed.abs().max()))
        by_zeros = by_zeros and float((zeroed - removed).abs().max()) < TOLERANCE * scale
        off = float((passed - removed).abs().max()) / scale
        reason = ""
        if not off < TOLERANCE and not by_zeros:
            reason = f"dropping block {i} differs from handing on its input by {off:.1e}"
        elif float((removed - dense).abs().max()) < MOVES * scale:
            reason = f"dropping block {i} does not move the logits, so nothing would be proven"
        elif caches and kinds.count(kinds[i]) > 1 and (stale := cache_difference(small, inputs)):
            reason = f"without block {i} generation with a cache is not the same: {stale}"
        if reason:
            return Verdict(None, reason)
    return Verdict(Recipe(), bypass=not by_zeros)


def _without(model: nn.Module, blocks: Group, i: int) -> nn.Module:
    small = duplicate(model)
    path = blocks.modules[0].rpartition(".")[0]
    drop_blocks(small, path, [j for j in range(blocks.units) if j != i])
    return small


def _stood_in_for(model: nn.Module, inputs: dict[str, Any], block: str) -> tuple[Tensor, Tensor]:
    """Logits with the block handing on its input, and with zeros for its parameters."""
    passing, zeroed = duplicate(model), duplicate(model)
    bypass(passing.get_submodule(block))
    zero_block(zeroed, block)
    return run(passing, inputs), run(zeroed, inputs)
