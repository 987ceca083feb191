"""Zero single weights, or N of every M inputs: magnitude and Wanda with their papers' schedules
(arXiv 2306.11695), OWL's through `ratio`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from prunekit.activations.blockwise import Feeding, Store, inside, walk
from prunekit.activations.moments import samples_at_once
from prunekit.activations.runs import WholeRun
from prunekit.architecture.matrices import block_names, fits, matrices, upright, zero_elements
from prunekit.errors import ConfigError
from prunekit.registry import Positive, pruners
from prunekit.selection import units as select
from prunekit.selection.elements import SCOPES, Pattern, everywhere, pattern
from prunekit.selection.eligible import spared
from prunekit.types import Counts, Group, Kept, Pruned, Scores

log = logging.getLogger("prunekit")


@pruners.register(paper="arXiv 2306.11695", year=2023, out="zeros", kinds=("weights",))
@torch.no_grad()
def weights(
    model: nn.Module,
    tokens: Tensor,
    criterion: Callable[..., Scores],
    ratio: Callable[..., Counts],
    exclude: Callable[[list[Group]], list[Group]],
    *,
    scope: Literal["row", "matrix", "model", "alpha"] = "row",
    keep_n: Positive | None = None,
    block_m: Positive | None = None,
    schedule: Literal["blocks", "whole"] = "blocks",
    targets: list[str] | None = None,
    store: Store = "memory",
    precision: Literal["model", "bf16"] = "model",
) -> Pruned:
    """Zeroes the lowest elements of the linear matrices inside the blocks; shapes stay.

    `scope=row` takes the same number from every output (rounded down), `matrix` so many of each
    matrix, `model` the same total wherever scores are lowest, `alpha` from every row the lowest
    ones up to the same share of its sum. `keep_n` of each `block_m` consecutive inputs stay (2:4 is
    keep_n=2 block_m=4); scope has no say then, and the ratio must agree, or decide (keep_n=null:
    the mixed N:8 of OWL). `schedule=blocks` scores a block on what the pruned ones before it put
    out, `whole` all of them on the dense model: the same for magnitude, and faster. `targets`
    narrows the matrices by name. Raises ConfigError where a pattern fits no matrix or ratio.
    """
    groups = spared(matrices(model, targets), exclude)
    run = WholeRun(model, tokens)
    asked = pattern(keep_n, block_m)
    if scope == "model" and schedule == "blocks" and asked is None:
        raise ConfigError(
            "pruner.scope=model ranks all matrices at once: it needs pruner.schedule=whole"
        )
    counts = ratio(model, groups, run)
    fits(model, groups, counts, asked)
    kept: Kept = {}
    if any(counts.values()):
        feeding = Feeding(samples_at_once(run), store, precision == "bf16")
        for part, scores in scored(run, groups, counts, criterion, schedule, feeding):
            select.finite(scores)
            mask = chosen(model, part, scores, counts, scope, asked)
            zero_elements(model, part, mask)
            kept |= mask
    emptied = [name for name, mask in kept.items() if not mask.any()]
    if emptied:
        log.warning("%d matrices lost every weight: %s", len(emptied), ", ".join(emptied[:5]))
    return Pruned(
        model,
        kept,
        groups,
        {},
        {"counts": {name: int((~mask).sum()) for name, mask in kept.items()}},
    )


def scored(
    run: WholeRun,
    groups: list[Group],
    counts: Counts,
    criterion: Callable[..., Scores],
    schedule: str,
    feeding: Feeding,
) -> Iterator[tuple[list[Group], Scores]]:
    """Groups that lose something, with their scores: block after block, or all at once."""
    if schedule == "whole":
        part = [g for g in groups if counts[g.name]]
        yield part, criterion(run.model, part, run)
        return
    blocks = block_names(run.model)
    rows = inside(groups, blocks)
    for block in walk(run.model, blocks, run.tokens, feeding):
        part = [g for g in rows[block.block] if counts[g.name]]
        if part:
            yield part, criterion(run.model, part, block)


def chosen(
    model: nn.Module,
    groups: list[Group],
    scores: Scores,
    counts: Counts,
    scope: str,
    asked: Pattern | None,
) -> Kept:
    """Masks, stored like the matrices, of what stays."""
    if scope == "model" and asked is None:
        return everywhere(scores, sum(counts[g.name] for g in groups))
    out: Kept = {}
    for g in groups:
        s = upright(model, g, scores[g.name])
        mask = (
            asked.mask(s, asked.kept_of(counts[g.name], g.units, g.name))
            if asked
            else SCOPES[scope](s, counts[g.name])
        )
        out[g.name] = upright(model, g, mask).contiguous()
    return out
