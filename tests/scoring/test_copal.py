"""The sensitivity of single weights against autograd and against Wanda."""

from __future__ import annotations

import torch

from prunekit.scoring.copal import sensitivity
from prunekit.scoring.wanda import wanda_score


def data(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 8, generator=g) @ torch.randn(8, 8, generator=g)
    return torch.randn(5, 8, generator=g), x


def test_it_is_the_weight_times_the_gradient_of_the_output_s_energy():
    W, x = data()
    W.requires_grad_()
    (x @ W.T).square().sum(1).mean().backward()
    found = sensitivity(W.detach(), x.T @ x / len(x))
    torch.testing.assert_close(found, (W * W.grad).abs().detach())


def test_inputs_that_do_not_correlate_leave_wanda_s_order():
    W, x = data(1)
    square = x.square().mean(0)
    torch.testing.assert_close(
        sensitivity(W, square.diag()), 2 * wanda_score(W, square.sqrt()).square()
    )


def test_texts_of_the_same_size_say_together_what_they_say_in_turn_where_they_agree():
    """Sensitivities add up like energies, up to the size that is taken of each."""
    W, x = data(2)
    first, second = (p.T @ p / len(p) for p in (x, 2 * x))
    torch.testing.assert_close(
        sensitivity(W, first) + sensitivity(W, second), sensitivity(W, first + second)
    )


def test_a_weight_that_is_zero_has_no_say():
    W, x = data(3)
    W[:, 2] = 0
    assert not sensitivity(W, x.T @ x)[:, 2].any()
