"""How much the loss minds an error in the residual stream: the covariance of the loss's gradient after each module that adds to it.

For a small error e_t at token t the loss moves by about (g_t . e_t)^2 / 2 on average (empirical Fisher; LLM Surgeon, arXiv 2312.17244,
uses the same covariance). A norm divides by the token's size, so gradients are taken with respect to the error relative to it. A few
tokens, the first of a text above all, carry activations a hundred times larger and serve as attention sinks: the loss minds relative
errors there thousands of times more. They are a class of their own, or they would drown all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.blocks import precision
from prunekit.gradients import lean_loss, only_these_train
from prunekit.stats import first_tensor
from prunekit.types import Run

HUGE = 4.0
"""A token whose size exceeds this many times the median is a sink."""
CLIP = 0.98
"""Quantile of the gradients' lengths over ordinary tokens at which longer ones are cut: rare tokens would decide too much."""
RIDGE = 0.1
"""Share of the mean diagonal that is added to a covariance: no direction is free."""


def scale(residual: Tensor) -> Tensor:
    """Root mean square of the residual stream `(..., C)` at every token: what a norm will divide by."""
    return residual.float().square().mean(-1).sqrt().clamp(min=1e-6)


@dataclass
class Sensitivity:
    """Sums over tokens at one place of the residual stream, with relative gradients (see the module's text)."""

    covariance: Tensor | None = None
    sizes: list[float] = field(default_factory=list)
    energy: list[float] = field(default_factory=lambda: [0.0, 0.0])
    tokens: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def typical(self) -> float:
        """Median size of a token."""
        return sum(self.sizes) / len(self.sizes)

    def add(self, size: Tensor, g: Tensor) -> None:
        """Take in the sizes `(tokens,)` and gradients `(tokens, C)` of a batch."""
        g = g.float() * size[:, None]
        middle = size.median()
        sinks = size > HUGE * middle
        self.energy[1] += float(g[sinks].square().sum())
        g = g[~sinks]
        length = g.norm(dim=1)
        g = g * (length.quantile(CLIP) / length.clamp(min=1e-30)).clamp(max=1)[:, None]
        self.energy[0] += float(g.square().sum())
        self.tokens = [self.tokens[0] + len(g), self.tokens[1] + int(sinks.sum())]
        self.sizes.append(float(middle))
        with torch.autocast(g.device.type, enabled=False):
            self.covariance = g.T @ g if self.covariance is None else self.covariance + g.T @ g

    def weights(self, size: Tensor) -> Tensor:
        """How much a squared error counts at tokens of this `size`: the mean squared relative gradient of their class over size^2."""
        ordinary = self.energy[0] / max(self.tokens[0], 1)
        sink = max(self.energy[1] / self.tokens[1], ordinary) if self.tokens[1] else ordinary
        return torch.where(size > HUGE * self.typical, sink, ordinary) / size.square()

    def half(self) -> Tensor:
        """A matrix `L (C, C)` with `L L^T` the covariance over ordinary tokens, scaled to a mean diagonal of one."""
        assert self.covariance is not None  # every place has seen a batch
        G = self.covariance.double()
        G = G / G.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        return torch.linalg.cholesky(G + RIDGE * torch.eye(len(G), dtype=G.dtype, device=G.device)).float()


def sensitivities(
    model: nn.Module, chains: Sequence[tuple[str, Sequence[str]]], run: Run, batch: int, bf16: bool
) -> dict[str, Sensitivity]:
    """Module name -> the sensitivity of the residual stream after it, from one forward and backward of the tokens of `run`.

    `chains` gives each block's name and, in order, those of the modules whose outputs are added to its input.
    """
    found = {name: Sensitivity() for _, modules in chains for name in modules}
    stream: list[Tensor] = []
    hooks: list[Any] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        stream[:] = [first_tensor(args, kwargs).detach().float()]

    def leave(name: str, module: nn.Module, args: Any, out: Any) -> None:
        y = first_tensor(out)
        if not y.requires_grad:
            y.requires_grad_()  # no parameter trains: the graph starts at the first of these outputs
        stream[0] = stream[0] + y.detach().reshape(stream[0].shape)  # OPT flattens samples and tokens
        size = scale(stream[0]).flatten()
        y.register_hook(lambda g: found[name].add(size, g.detach().reshape(-1, g.shape[-1])))

    done = 0
    tokens: Tensor = run.tokens  # type: ignore[attr-defined]
    try:
        for block, modules in chains:
            hooks.append(model.get_submodule(block).register_forward_pre_hook(enter, with_kwargs=True))
            hooks += [model.get_submodule(m).register_forward_hook(partial(leave, m)) for m in modules]
        device = next(model.parameters()).device
        with torch.enable_grad(), only_these_train(model, set()), lean_loss(model), precision(bf16, device):
            for out in tqdm(run(labels=True, batch=batch), total=-(-len(tokens) // batch), desc="sensitivity", leave=False, delay=2):
                samples = min(batch, len(tokens) - done)
                done += samples
                (out.loss * (samples * (tokens.shape[1] - 1))).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return found
