"""Scores of whole blocks by magnitude, gradient and perplexity (Shortened LLaMA, Kim et al., arXiv
2402.02834, section 3.2).

The paper's "+" never removes the first four and the last two blocks: `exclude=ends exclude.first=4
exclude.last=2`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from prunekit.activations.storage import Store
from prunekit.registry import Positive, criteria
from prunekit.scoring.block_ablation import losses_without
from prunekit.scoring.block_gradients import gradients
from prunekit.scoring.lean_backward import lean_activations
from prunekit.types import Group, Run, Scores, tensor_of


@criteria.register(paper="arXiv 2402.02834", year=2024, needs="-", kinds=("blocks",))
@torch.no_grad()
def block_magnitude(
    model: nn.Module, groups: list[Group], run: Run, *, p: Literal[1, 2] = 1
) -> Scores:
    """Sum of |w|^p over all weights of a block."""

    def total(block: str) -> Tensor:
        return torch.stack(
            [tensor_of(model, n).float().abs().pow(p).sum() for n in weights_of(model, block)]
        ).sum()

    return {g.name: torch.stack([total(b).cpu() for b in g.modules]) for g in groups}


@criteria.register(paper="arXiv 2402.02834", year=2024, needs="gradients", kinds=("blocks",))
def block_taylor(
    model: nn.Module,
    groups: list[Group],
    run: Run,
    *,
    batch: Positive | None = None,
    by_block: bool | None = None,
    store: Store = "memory",
) -> Scores:
    """Sum of |w dL/dw| over all weights of a block, from the gradient of the mean loss over the
    calibration text.

    `batch` samples go at a time (default: what makes up 2,048 tokens); gradients are summed before
    the absolute value is taken, so it changes memory, not scores. `by_block` differentiates one
    block at a time, with the memory of one (default: where `model.weights=disk`); what the blocks
    read waits in `store`.
    """
    # A weight that blocks share (Zamba2) has one gradient, under the first of its names.
    first = {p: n for n, p in model.named_parameters()}
    owned = {
        b: [first[model.get_parameter(n)] for n in weights_of(model, b)]
        for g in groups
        for b in g.modules
    }
    names = [n for own in owned.values() for n in own]
    parts: dict[str, Tensor] = {}

    def fold(name: str, weight: Tensor, gradient: Tensor, _squares: Tensor | None) -> None:
        parts[name] = (weight.float() * gradient.float()).abs().sum()

    with lean_activations(model.get_submodule(b) for g in groups for b in g.modules):
        gradients(
            model, names, run, fold, squares=False, batch=batch, by_block=by_block, store=store
        )
    # In one order, whatever that in which gradients come.
    totals = {b: torch.stack([parts[n] for n in own]).sum().cpu() for b, own in owned.items()}
    return {g.name: torch.stack([totals[b] for b in g.modules]) for g in groups}


@criteria.register(paper="arXiv 2402.02834, 2402.09025", year=2024, needs="data", kinds=("blocks",))
def block_ppl(
    model: nn.Module, groups: list[Group], run: Run, *, batch: Positive = 8, reuse: bool = True
) -> Scores:
    """Log perplexity of the model without the block on the calibration text; with `pruner=greedy`
    this is SLEB.

    `batch` samples a forward. `reuse` starts each trial from the activations that entered the
    block, held for one batch at a time; set it to false for a model whose blocks hand each other
    more than those.
    """
    return {g.name: losses_without(model, g.modules, run, batch, reuse) for g in groups}


def weights_of(model: nn.Module, block: str) -> list[str]:
    """Names of the weights of a block, norms included; biases are not scored."""
    return [
        f"{block}.{n}"
        for n, _ in model.get_submodule(block).named_parameters()
        if not n.endswith("bias")
    ]
