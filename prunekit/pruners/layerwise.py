"""Score, choose and apply block by block; the next block is scored on what the pruned ones before
it put out.

The schedule of Wanda (Sun et al., ICLR 2024, arXiv 2306.11695) and SparseGPT (Frantar & Alistarh,
ICML 2023, arXiv 2301.00774), for any criterion that watches activations and any unit inside a
block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from prunekit import graph
from prunekit.activations.blockwise import Feeding, Store, inside, stack, walk
from prunekit.activations.moments import samples_at_once
from prunekit.activations.runs import WholeRun
from prunekit.registry import pruners
from prunekit.selection import units as select
from prunekit.selection.eligible import of_kinds, spared
from prunekit.solvers.bias_compensation import add_biases, lost_means
from prunekit.types import Counts, Group, Kept, Pruned, Scores


@pruners.register(
    paper="arXiv 2306.11695", year=2023, needs="data", out="self-contained", kinds="option"
)
@torch.no_grad()
def layerwise(
    model: nn.Module,
    tokens: Tensor,
    criterion: Callable[..., Scores],
    ratio: Callable[..., Counts],
    exclude: Callable[[list[Group]], list[Group]],
    *,
    kinds: list[Literal["neurons", "heads", "experts", "inner"]] = ["heads", "neurons"],  # noqa: B006 (never mutated; the YAML states it)
    compensate: Literal["none", "bias"] = "none",
    store: Store = "memory",
    precision: Literal["model", "bf16"] = "model",
    compress: bool = True,
    verify: bool = True,
) -> Pruned:
    """Scores a block's units on what reaches it, removes the lowest, and goes on to the next block
    with what the pruned one puts out.

    Counts come from `ratio`, once, on the dense model. `compensate=bias` leaves the mean output of
    what goes as a bias (FLAP). `store` says where the activations between two blocks wait: memory,
    half (bfloat16) or disk; beyond them and the statistics of one block nothing is held.
    `precision=bf16` runs the forwards in bfloat16. `compress=false` zeroes the units and keeps the
    shapes. `verify` proves on a small twin that removing equals zeroing. Raises ConfigError for a
    criterion that needs the loss, and for units that stand outside the blocks.
    """
    everything = graph.discover(model, verify=verify)
    groups = spared(of_kinds(model, everything, kinds), exclude)
    blocks = stack(everything)
    rows = inside(groups, blocks)
    run = WholeRun(model, tokens)
    counts = ratio(model, groups, run)
    kept: Kept = {}
    first: Scores = {}
    if any(counts.values()):
        for block in walk(
            model, blocks, tokens, Feeding(samples_at_once(run), store, precision == "bf16")
        ):
            row = rows[block.block]
            if not any(counts[g.name] for g in row):
                continue
            scores = criterion(model, row, block)
            mask = select.local(scores, counts)
            lost = lost_means(model, row, mask, block) if compensate == "bias" else {}
            graph.zero(model, mask)
            add_biases(model, lost)
            kept |= mask
            first |= scores
    if compress:
        graph.remove(model, kept)
    return Pruned(model, kept, groups, first, {"counts": counts})
