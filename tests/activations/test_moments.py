"""Moments of activations: exact in one pass."""

from __future__ import annotations

import torch

from prunekit.activations.moments import Moments


def test_moments_are_exact_whatever_the_batches():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)) * 3 + 100
    m = Moments(7)
    for part in x.split([1, 19, 30]):
        m.add(part)
    torch.testing.assert_close(m.mean, x.mean(0))
    torch.testing.assert_close(m.variance, x.var(0, unbiased=False), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m.square, x.square().mean(0))
