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
        take_in(found[f.neurons.name], a, g, weighted, index)

    def of_one(name: str, g: Tensor | None, x: Tensor) -> None:
        one, reader = read[name]
        g = x.new_ones(len(x)) if g is None else g
        a = x[:, reader.member.index[:, 0].to(x.device)]
        take_in(found[one.neurons.name], a, g, weighted, torch.zeros_like(g, dtype=torch.int64))

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


def take_in(experts: list[Folds], a: Tensor, g: Tensor, weighted: bool, index: Tensor) -> None:
    """Add tokens `a (T, F)` with weights `g (T,)` to the sums of the expert `index (T,)` of each.
    The host waits once a fold, however many experts there are.
    """
    square = g.float().square() if weighted else torch.ones_like(g, dtype=torch.float32)
    none = len(experts)  # a token that is skipped, and an expert without weights of its own
    owner = torch.where((g != 0) & (index < none), index, none)
    numbers = torch.arange(none, device=a.device)
    for fold, rows in enumerate(torch.arange(len(a), device=a.device).chunk(FOLDS)):
        mine = owner[rows]
        order = rows[mine.argsort(stable=True)]
        counts = (mine[:, None] == numbers).sum(0).tolist()
        for folds, own in zip(experts, order.split([*counts, len(rows) - sum(counts)])):
            if len(own):
                folds[fold].add(a[own], w=square[own])
