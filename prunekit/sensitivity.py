"""How much the loss minds an error in what each linear module adds to the network: the covariance of the loss's gradient there.

For a small error e_t at token t the loss moves by about (g_t . e_t)^2 / 2 on average (empirical Fisher; LLM Surgeon, arXiv 2312.17244,
uses the same covariance). Gradients are scaled by the size of the token's residual stream, to go with errors measured relative to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.blocks import precision
from prunekit.gradients import lean_loss, only_these_train
from prunekit.stats import first_tensor
from prunekit.types import Run

CLIP = 0.98
"""Quantile of the gradients' lengths at which longer ones are cut: the few tokens with huge activations would drown all others."""


def scale(residual: Tensor) -> Tensor:
    """Root mean square of the residual stream `(..., C)` at every token: what a norm will divide by."""
    return residual.float().square().mean(-1).sqrt().clamp(min=1e-6)


def gradient_covariances(
    model: nn.Module, chains: Sequence[tuple[str, Sequence[str]]], run: Run, batch: int, bf16: bool
) -> dict[str, Tensor]:
    """Module name -> `(C, C)` float32 covariance of the gradient at its output, over all tokens of `run`.

    `chains` gives each block's name and, in order, those of the modules whose outputs are added to its input.
    """
    names = [name for _, modules in chains for name in modules]
    found: dict[str, Tensor] = {}
    stream: list[Tensor] = []
    hooks: list[Any] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        stream[:] = [first_tensor(args, kwargs).detach().float()]

    def leave(name: str, module: nn.Module, args: Any, out: Any) -> None:
        y = first_tensor(out)
        if not y.requires_grad:
            y.requires_grad_()  # no parameter trains: the graph starts at the first of these outputs
        stream[0] = stream[0] + y.detach().reshape(stream[0].shape)  # OPT flattens samples and tokens
        size = scale(stream[0]).reshape(-1, 1)
        y.register_hook(lambda g: take(name, g.detach().reshape(-1, g.shape[-1]).float() * size))

    def take(name: str, g: Tensor) -> None:
        length = g.norm(dim=1)
        g = g * (length.quantile(CLIP) / length.clamp(min=1e-30)).clamp(max=1)[:, None]
        with torch.autocast(g.device.type, enabled=False):
            found[name] = found.get(name, 0) + g.T @ g

    total = 0
    tokens: Tensor = run.tokens  # type: ignore[attr-defined]
    try:
        for block, modules in chains:
            hooks.append(model.get_submodule(block).register_forward_pre_hook(enter, with_kwargs=True))
            hooks += [model.get_submodule(m).register_forward_hook(partial(leave, m)) for m in modules]
        with torch.enable_grad(), only_these_train(model, set()), lean_loss(model), precision(bf16, next(model.parameters()).device):
            for out in tqdm(run(labels=True, batch=batch), total=-(-len(tokens) // batch), desc="sensitivity", leave=False, delay=2):
                samples = min(batch, len(tokens) - total)
                total += samples
                (out.loss * (samples * (tokens.shape[1] - 1))).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[name] / tokens.numel() for name in names}
