"""Structured optimal brain surgeon, block by block (ZipLM, Kurtic et al., NeurIPS 2023, arXiv
2302.04089; SlimGPT, arXiv 2412.18110).

Heads and neurons go one at a time, the one whose removal costs least by `tr(W_S (H^-1_SS)^-1
W_S^T)` first; what remains of the module that reads them (`o_proj`, `down_proj`) is then the least
squares map, in closed form. Beyond the papers, each as an option: the map aims at the dense
network's residual stream instead of the module's own former output, so that a block repairs what
earlier ones broke; it has a bias; errors count relative to the size of the token's residual stream.
Where the parameters of a budget cost least is `ratio=cost`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from prunekit import graph
from prunekit.activations.dense_reference import check_readers
from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.problem import Expected, Problem, expect
from prunekit.pruners.structured_obs import (
    Kinds,
    Tokens,
    check_samples,
    local_allocation,
    read_groups,
    readers_of,
    refit_blocks,
    regression,
)
from prunekit.registry import pruners
from prunekit.types import Pruned


def check_obs(problem: Problem, *, kinds: list[str], **_: Any) -> Expected:
    """Raises ConfigError where the ratio cannot be met, or units have no reader."""
    expected = expect(problem, problem.groups(kinds))
    check_readers(expected.groups, readers_of(problem))
    if expected.counts is not None:
        local_allocation(problem, expected.groups, "obs")
    return expected


@pruners.register(
    paper="arXiv 2302.04089, 2412.18110",
    year=2024,
    needs="data",
    out="self-contained",
    check=check_obs,
)
@torch.no_grad()
def obs(
    problem: Problem,
    *,
    kinds: Kinds = ["heads", "neurons"],  # noqa: B006 (never mutated; the YAML states it)
    target: Literal["own", "dense"] = "own",
    bias: bool = True,
    token_weight: Literal["relative", "equal"] = "relative",
    ridge: Tokens | Literal["auto"] = "auto",
    dense_ridge: Tokens | Literal["auto"] = "auto",
    store: Store = "memory",
    precision: Precision = "fast",
) -> Pruned:
    """Removes heads and neurons by their exact quadratic cost and refits the modules that read them
    in closed form, block by block.

    Args:
        kinds: of units that may go.
        target: `own` keeps the readers' outputs where they are; `dense` moves the residual stream
            back to the dense network's.
        bias: gives the readers a bias.
        token_weight: how much a token's error counts: relative to the token's size, or equally.
        ridge: tokens that hold the readers near their dense weights; `auto` takes for each reader
            the number that does best on the half of the samples that it is not fitted to.
        dense_ridge: likewise for what moves the outputs, with target=dense.
        store: where activations between blocks wait.
        precision: of the forwards; sums are float32, solutions float64 either way.

    Notes say the ridges of each reader. Nothing changes where the ratio removes nothing. Raises
    ConfigError for units that no linear module of a block reads, and for a single sample where a
    ridge is to be chosen.
    """
    model = problem.model
    groups, readers = read_groups(problem, kinds)
    counts = local_allocation(problem, groups, "obs").counts
    if not any(counts.values()):
        return Pruned(model, {}, groups, {}, {"counts": counts})
    how = regression(target, bias, token_weight, ridge, dense_ridge)
    check_samples("obs", how, problem.tokens)
    kept, notes = refit_blocks(problem, readers, counts, how, PassOptions(store, precision))
    graph.remove(model, kept)
    return Pruned(model, kept, groups, {}, {"counts": counts, **notes})
