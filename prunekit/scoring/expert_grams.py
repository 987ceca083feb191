"""Gram matrices of what the neurons of each expert put out, over the tokens routed to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunekit.activations import processes
from prunekit.activations.gram import GramStatistics
from prunekit.activations.hooks import pass_tokens
from prunekit.scoring.expert_inputs import FusedExperts, watch_fused
from prunekit.scoring.listed_experts import LoneNeurons, lone_reader, watch_linear
from prunekit.types import Group, Run, tensor_of

Folds = list[GramStatistics]
"""The sums of two parts of the text."""
FOLDS = 2


@torch.no_grad()
def expert_grams(
    model: nn.Module,
    fused: Sequence[FusedExperts],
    lone: Sequence[LoneNeurons],
    run: Run,
    weighted: bool,
) -> dict[str, list[Folds]]:
    """By the neurons' group one `Folds` an expert (of `lone` a single one), from one pass; its
    channels are the neurons in the order of their group.

    A token counts times the square of the weight with which the module adds the expert's output
    where `weighted`; a token that is skipped (weight 0) counts for none. The first half of each
    batch goes to one fold, the second to the other. Raises ConfigError where the routing cannot be
    had.
    """
    found = {
        f.neurons.name: [
            _nothing(f.neurons, tensor_of(model, f.writer[0].param)) for _ in range(f.experts)
        ]
        for f in fused
    }
    read = {r.name: (one, r) for one in lone for r in [lone_reader(model, one)]}
    found |= {one.neurons.name: [_nothing(one.neurons, r.weight)] for one, r in read.values()}

    def of_fused(f: FusedExperts, index: Tensor, g: Tensor, x: Tensor, a: Tensor) -> None:
        for e in range(f.experts):
            _take_in(found[f.neurons.name][e], a, g, weighted, index == e)

    def of_one(name: str, g: Tensor | None, x: Tensor) -> None:
        one, reader = read[name]
        g = x.new_ones(len(x)) if g is None else g
        a = x[:, reader.member.index[:, 0].to(x.device)]
        _take_in(found[one.neurons.name][0], a, g, weighted, g != 0)

    with (
        watch_fused(model, fused, of_fused),
        watch_linear(model, {n: one.experts for n, (one, _) in read.items()}, of_one),
    ):
        pass_tokens(processes.own_part(run), "inside experts")
    if processes.count() > 1:
        for sums in (s for experts in found.values() for folds in experts for s in folds):
            sums.add_up()
    return found


def _nothing(neurons: Group, beside: Tensor) -> Folds:
    return [GramStatistics(neurons.units, device=beside.device) for _ in range(FOLDS)]


def _take_in(folds: Folds, a: Tensor, g: Tensor, weighted: bool, mine: Tensor) -> None:
    """Add those tokens of a batch that are an expert's own: `a (T, F)` with weights `g (T,)`."""
    square = g.float().square() if weighted else torch.ones_like(g, dtype=torch.float32)
    mine = mine & (g != 0)
    for fold, rows in zip(folds, torch.arange(len(a), device=a.device).chunk(FOLDS), strict=False):
        own = rows[mine[rows]]
        if len(own):
            fold.add(a[own], w=square[own])
