"""Bases of the residual stream: turned within their subspaces, carried by a low-rank product."""

from __future__ import annotations

from itertools import pairwise

import torch

from prunekit.solvers.rotation import shortcut, turned


def test_shortcuts_are_the_product_of_bases():
    rng = torch.Generator().manual_seed(0)
    subspaces = [
        torch.linalg.qr(torch.randn(12, 9, generator=rng, dtype=torch.float64))[0] for _ in range(4)
    ]
    bases = list(turned(subspaces))
    for Q, old in zip(bases, subspaces):
        torch.testing.assert_close(Q @ Q.T, old @ old.T)
    for a, b in pairwise(bases):
        B = shortcut(a, b)
        assert B.shape[1] <= 3
        torch.testing.assert_close(
            torch.eye(9, dtype=B.dtype) - B @ B.T, a.T @ b, rtol=0, atol=1e-5
        )
