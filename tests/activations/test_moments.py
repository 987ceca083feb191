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


def test_no_tokens_change_nothing():
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    m, plain, none = Moments(7), Moments(7), Moments(7)
    plain.add(x)
    for part in (x[:0], x, x[:0]):
        m.add(part)
    none.add(x[:0])
    assert torch.equal(m.square, plain.square)
    assert m.count == 5
    assert torch.equal(none.square, torch.zeros(7))
    assert none.count == 0
