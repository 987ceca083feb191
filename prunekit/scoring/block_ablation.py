"""Whole blocks: what the model loses without one of them, without running again what comes before
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.activations.hooks import hook_activations, raise_stop, stop_early
from prunekit.activations.runs import forward
from prunekit.architecture.modes import forward_replaced
from prunekit.architecture.streaming import without_weights
from prunekit.graph.masks import bypass
from prunekit.types import Run


def siblings(model: nn.Module, name: str) -> tuple[list[nn.Module], int]:
    """All blocks of the list that the block `name` stands in, and its place there."""
    parent, _, leaf = name.rpartition(".")
    return list(model.get_submodule(parent).children()), int(leaf)


def returning(
    block: nn.Module, activation: Tensor, rest: tuple[Any, ...] | None
) -> AbstractContextManager[None]:
    """Inside, the block computes nothing and returns `activation`; `rest` is what used to follow
    it, None for a bare tensor.
    """
    out = activation if rest is None else (activation, *rest)
    return forward_replaced(block, without_weights(lambda *_, **__: out))


@torch.no_grad()
def losses_without(
    model: nn.Module, names: Sequence[str], run: Run, batch: int, reuse: bool = True
) -> Tensor:
    """(len(names),) mean loss per predicted token of the model that lacks one block each time.

    `reuse` starts each trial from the activations that entered the block in the whole model, which
    halves the work and holds one activation a block of `batch` samples; a model whose blocks hand
    each other more than those needs `reuse=False`.
    """
    total = torch.zeros(len(names), dtype=torch.float64)
    parts = run.tokens.split(batch)
    trials = len(parts) * len(names)
    with tqdm(total=trials, desc="models without a block", unit="model", leave=False) as bar:
        for ids in parts:
            entered, rests = entering(model, names, ids)
            for i, name in enumerate(names):
                with ExitStack() as stack:
                    blocks, place = siblings(model, name)
                    if reuse:
                        for b in blocks[: place + 1]:
                            stack.enter_context(returning(b, entered[name], rests[name]))
                    else:
                        stack.callback(bypass(blocks[place]).remove)
                    loss = forward(model, ids, labels=True).loss
                total[i] += float(loss) * len(ids) / len(run.tokens)
                bar.update()
    return total.float()


def entering(
    model: nn.Module, names: Sequence[str], ids: Tensor
) -> tuple[dict[str, Tensor], dict[str, tuple[Any, ...] | None]]:
    """What entered each block in one forward of `ids (n, T)`, and what followed the activation that
    it returned. What comes after these blocks is not run.
    """
    entered: dict[str, Tensor] = {}
    rests: dict[str, tuple[Any, ...] | None] = {}

    def keep(name: str, _module: nn.Module, _args: Any, out: Any) -> None:
        rests[name] = None if isinstance(out, Tensor) else tuple(out[1:])
        if len(rests) == len(names):
            raise_stop()

    hooks = [model.get_submodule(n).register_forward_hook(partial(keep, n)) for n in names]
    try:
        inputs = {n: partial(entered.__setitem__, n) for n in names}
        with stop_early(), hook_activations(model, inputs=inputs):
            forward(model, ids, head=False)
    finally:
        for h in hooks:
            h.remove()
    return entered, rests
