"""Small regressions with correlated inputs, and their sums."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.activations.gram import GramStatistics


def data(
    tokens: int = 400, inputs: int = 24, outputs: int = 7, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Inputs `(tokens, inputs)` and weights `(outputs, inputs)`."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g) * 0.4 + torch.eye(inputs)
    x = torch.randn(tokens, inputs, generator=g) @ mix + torch.randn(inputs, generator=g)
    return x, torch.randn(outputs, inputs, generator=g)


def layer(
    seed: int = 0, outputs: int = 6, inputs: int = 24, tokens: int = 80
) -> tuple[Tensor, Tensor]:
    """Weights `(outputs, inputs)` and the mean gram matrix of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(outputs, inputs, generator=g)
    mix = torch.randn(inputs, inputs, generator=g)
    X = torch.randn(tokens, inputs, generator=g) @ mix
    return W, X.T @ X / tokens


def best_within(W: Tensor, H: Tensor, mask: Tensor) -> Tensor:
    """Row by row, the weights of the mask that best stand in for all of `W` under the gram matrix
    `H`.
    """
    out = torch.zeros_like(W, dtype=torch.float64)
    for i, keep in enumerate(mask):
        out[i, keep] = torch.linalg.solve(H[keep][:, keep], H[keep] @ W[i].double())
    return out


def gathered(x: Tensor, y: Tensor, w: Tensor | None = None) -> GramStatistics:
    stats = GramStatistics(x.shape[1], y.shape[1])
    for i in range(0, len(x), 90):  # several batches, the last one smaller
        stats.add(x[i : i + 90], y[i : i + 90], None if w is None else w[i : i + 90])
    return stats
