"""BESA's learned shares against their definition and against plain Wanda."""

from __future__ import annotations

import pytest
import torch

from prunekit.scoring.wanda import wanda_score
from prunekit.solvers.besa import (
    channel_error,
    learn,
    mask,
    project,
    ranked,
    share_of,
    start,
    staying,
)


def theta_of(rows: int, candidates: int = 100, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, candidates + 1, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("inputs", [7, 64, 100, 576])
def test_what_stays_is_the_paper_s_soft_mask(inputs):
    """P(r) = sum of beta_d over the candidates d that remove more than r weights of a row."""
    theta = theta_of(3)
    beta = torch.softmax(theta.double(), 1)
    removed = torch.tensor([inputs * d // 100 for d in range(101)])
    plain = torch.stack([beta[:, removed > r].sum(1) for r in range(inputs)], 1)
    found = staying(theta.double(), inputs)
    torch.testing.assert_close(1 - found, plain)
    assert (found.diff(dim=1) >= 0).all()
    torch.testing.assert_close((1 - found).mean(1), (beta * removed).sum(1) / inputs)


def test_shares_are_the_mean_of_the_candidates_and_start_at_any_target():
    theta = theta_of(4)
    plain = torch.stack([sum(b * d / 100 for d, b in enumerate(r)) for r in theta.softmax(1)])
    torch.testing.assert_close(share_of(theta), plain)
    assert not start(0.5, 1, 100).abs().max() > 1e-6  # the paper's start
    for target in (0.01, 0.2, 0.5, 0.7, 0.95):
        assert share_of(start(target, 2, 100)).tolist() == pytest.approx([target] * 2, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 6])
def test_masks_are_hard_and_their_gradient_is_the_soft_one_s(rows):
    g = torch.Generator().manual_seed(1)
    W, scores = torch.randn(6, 50, generator=g), torch.rand(6, 50, generator=g)
    theta = theta_of(rows).requires_grad_()
    found = mask(theta, ranked(W, scores).rank)
    removed = (share_of(theta) * 50 + 1e-4).long().expand(6)
    for i in range(6):
        gone = scores[i].argsort()[: removed[i]]
        assert sorted((found[i] == 0).nonzero()[:, 0].tolist()) == sorted(gone.tolist())
    assert set(found.unique().tolist()) == {0.0, 1.0}
    weights = torch.randn(6, 50, generator=g)
    (found * weights).sum().backward()
    other = theta.detach().clone().requires_grad_()
    soft = staying(other, 50).expand(6, -1).gather(1, ranked(W, scores).rank)
    (soft * weights).sum().backward()
    torch.testing.assert_close(theta.grad, other.grad)
    assert theta.grad.abs().sum() > 0


def test_a_whole_number_of_weights_is_not_missed_by_rounding():
    rank = torch.arange(40)[None]
    for d in range(1, 100):
        removed = int((mask(start(d / 100, 1, 100), rank) == 0).sum())
        assert removed == 40 * d // 100


def test_error_is_relative_to_each_channel():
    g = torch.Generator().manual_seed(2)
    dense, out = torch.randn(2, 5, 3, generator=g), torch.randn(2, 5, 3, generator=g)
    plain = [((out[..., j] - dense[..., j]).norm() / dense[..., j].norm()) ** 2 for j in range(3)]
    torch.testing.assert_close(channel_error(out, dense), torch.stack(plain).mean())
    scale = torch.tensor([1.0, 100.0, 0.01])
    torch.testing.assert_close(channel_error(out * scale, dense * scale), channel_error(out, dense))
    assert channel_error(torch.zeros(4, 3), torch.zeros(4, 3)) == 0


def toy(seed: int):
    """An FFN whose matrices bear pruning unequally, and its batches."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(24, 24, generator=g)
    batches = [torch.randn(60, 24, generator=g) @ mix for _ in range(4)]
    rows = torch.randn(48, 1, generator=g).exp()
    up = torch.randn(48, 24, generator=g) * rows
    down = torch.randn(24, 48, generator=g) * torch.randn(24, 1, generator=g).exp()
    down[:, 24:] *= torch.randn(24, 24, generator=g).pow(2)
    weights = {"up": up, "down": down}

    def forward(w, x):
        return torch.relu(x @ w["up"].T) @ w["down"].T

    inputs = torch.cat(batches)
    hidden = torch.relu(inputs @ up.T)
    matrices = {
        "up": ranked(up, wanda_score(up, inputs.norm(dim=0))),
        "down": ranked(down, wanda_score(down, hidden.norm(dim=0))),
    }
    dense = [forward(weights, x) for x in batches]
    return matrices, forward, batches, dense


def removed_to(matrices, counts):
    return {n: m.weight * (m.rank >= c[:, None]) for (n, m), c in zip(matrices.items(), counts)}


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("target", [0.3, 0.5])
def test_learned_shares_beat_uniform_ones_at_the_same_count(per_row, target):
    for seed in range(2):
        matrices, forward, batches, dense = toy(seed)

        def error(w, step, batches=batches, dense=dense, forward=forward):
            return channel_error(forward(w, batches[step % 4]), dense[step % 4])

        shares = learn(matrices, error, target, 60, per_row=per_row)
        total = int(target * 2 * 24 * 48)
        learned = project(list(shares.values()), [24, 48], [48, 24], total)
        uniform = project([torch.tensor([target])] * 2, [24, 48], [48, 24], total)
        gone = [
            sum(int((w == 0).sum()) for w in removed_to(matrices, c).values())
            for c in (learned, uniform)
        ]
        assert gone[0] >= gone[1]  # what rounds down removes less
        errors = [
            sum(error(removed_to(matrices, c), i) for i in range(4)) for c in (learned, uniform)
        ]
        assert errors[0] < errors[1]
        if per_row and target == 0.5:
            reach = torch.cat(list(shares.values()))
            assert reach.min() < 0.376
            assert reach.max() > 0.624  # what the authors' default cannot leave


def test_projection_meets_the_count_within_one_step():
    g = torch.Generator().manual_seed(3)
    inputs, rows = [64, 64, 160], [64, 48, 64]
    total = sum(i * r for i, r in zip(inputs, rows))
    for target in (0.05, 0.3, 0.5, 0.9, 0.97):
        for per_row in (False, True):
            shares = [torch.rand(r if per_row else 1, generator=g) for r in rows]
            counts = project(shares, inputs, rows, int(target * total))
            step = [1 if per_row else r for r in rows]
            gone = sum(int(c.sum()) * s for c, s in zip(counts, step))
            assert 0 <= int(target * total) - gone < max(step)
            for c, s, i in zip(counts, shares, inputs):
                assert c.shape == s.shape
                assert (c >= 0).all()
                assert (c < i).all()


def test_shares_that_meet_the_count_stay():
    counts = project([torch.tensor([0.25]), torch.tensor([0.75])], [8, 8], [4, 4], 32)
    assert [c.tolist() for c in counts] == [[2], [6]]


def test_shares_of_float16_weights_are_learned_too():
    """Of the mean error over channels the slope at one token is below the least of float16."""
    g = torch.Generator().manual_seed(0)
    x = 100 * torch.randn(4096, 32, generator=g)
    weights = {"much": torch.randn(64, 32, generator=g), "little": torch.randn(64, 32, generator=g)}
    found = {}
    for dtype in (torch.float32, torch.float16):
        inputs = x.to(dtype)
        matrices = {n: ranked(w.to(dtype), w.abs()) for n, w in weights.items()}

        def forward(w, inputs=inputs):
            return inputs @ w["much"].T + 0.1 * (inputs @ w["little"].T)

        dense = forward({n: m.weight for n, m in matrices.items()})
        learned = learn(matrices, lambda w, _, f=forward, d=dense: channel_error(f(w), d), 0.5, 12)
        found[dtype] = torch.cat([learned["much"], learned["little"]])
    exact, half = found.values()
    assert exact[1] - exact[0] > 0.1
    torch.testing.assert_close(half, exact, rtol=0, atol=0.02)
