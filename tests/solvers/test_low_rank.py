"""Rank truncation against its theory and the exact truncations of the authors' inputs."""

from __future__ import annotations

import pytest
import torch
from paths import authors_numbers

from prunekit.solvers.low_rank import rank_of, smaller_as_factors, spectrum

RATES = ["9.5", "9", "8", "6", "4", "2"]


@pytest.fixture(scope="module")
def golden():
    return authors_numbers("laser")


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", ["decay", "flat"])
def test_truncation_is_the_exact_one(golden, kind, rate):
    W = golden[f"W_{kind}"]
    rank = rank_of(W.shape, 1 - float(rate) / 10)
    assert rank == golden[f"rank_{kind}_{rate}"]
    found = spectrum(W).truncated(rank).dense()
    torch.testing.assert_close(
        found, golden[f"exact_{kind}_{rate}"], rtol=0, atol=1e-5 * W.abs().max().item()
    )
    theirs = (W - golden[f"approx_{kind}_{rate}"]).norm()  # a randomised decomposition
    assert (W - found).norm() <= theirs * (1 + 1e-6)


def test_error_is_that_of_the_values_left_out():
    W = torch.randn(9, 14, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    parts, before = spectrum(W), float("inf")
    for rank in range(1, 10):
        kept = parts.truncated(rank).dense()
        assert torch.linalg.matrix_rank(kept) == rank
        torch.testing.assert_close((W - kept).norm(), parts.error(rank))
        assert parts.error(rank) < before
        before = parts.error(rank)
    torch.testing.assert_close(parts.truncated(9).dense(), W)


def test_no_other_projection_of_that_rank_is_nearer():
    g = torch.Generator().manual_seed(1)
    W = torch.randn(12, 10, generator=g)
    gap = torch.linalg.matrix_norm(W - spectrum(W).truncated(4).dense(), 2)
    for _ in range(20):
        Q = torch.linalg.qr(torch.randn(12, 4, generator=g)).Q
        assert torch.linalg.matrix_norm(W - Q @ Q.T @ W, 2) >= gap


def test_half_precision_is_decomposed_in_single():
    W = torch.randn(6, 5, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert spectrum(W).truncated(5).left.dtype == torch.float32
    torch.testing.assert_close(spectrum(W).truncated(5).dense(), W.float())


def test_ranks_are_rounded_down_but_never_to_nothing():
    assert [rank_of((100, 300), share) for share in (0.29, 0.999, 1.0, 0.001)] == [29, 99, 100, 1]


def test_factors_are_smaller_below_the_break_even_rank():
    assert smaller_as_factors((30, 60), 19)
    assert not smaller_as_factors((30, 60), 20)  # 20 * 90 = 30 * 60
    assert not smaller_as_factors((30, 60), 30)
