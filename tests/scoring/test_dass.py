"""DaSS's scores against the authors' masks and against what the formula promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from paths import GOLDEN

from prunekit.scoring.dass import maker_score
from prunekit.scoring.wanda import wanda_score
from prunekit.selection.elements import drop_lowest


@pytest.fixture(scope="module")
def golden():
    found = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "dass.npz").items()}
    X = found["X"].reshape(-1, found["X"].shape[-1])
    z = torch.nn.functional.silu(X @ found["gate"].T) * (X @ found["up"].T)
    return found | {"norms": z.norm(dim=0)}


def along_columns(scores, removed, block=None):
    """Masks of what stays where the rows compete, all of them or in runs of `block`."""
    turned = scores.T if block is None else scores.T.reshape(-1, block)
    return drop_lowest(turned, removed).view(scores.T.shape).T


@pytest.mark.parametrize("name", ["gate", "up"])
def test_masks_of_what_makes_the_channels_are_the_authors(golden, name):
    scores = maker_score(golden[name], golden["norms"])
    for share, removed in (("50", 32), ("70", 44)):
        assert torch.equal(~along_columns(scores, removed), golden[f"gone_{share}_{name}"])
    for pattern, removed, block in (("24", 2, 4), ("48", 4, 8), ("14", 1, 4)):
        assert torch.equal(~along_columns(scores, removed, block), golden[f"gone_{pattern}_{name}"])


def test_masks_of_what_reads_the_channels_are_the_authors(golden):
    scores = wanda_score(golden["down"], golden["norms"])
    for share, removed in (("50", 32), ("70", 44)):
        assert torch.equal(~drop_lowest(scores, removed), golden[f"gone_{share}_down"])
    for pattern, removed, block in (("24", 2, 4), ("48", 4, 8), ("14", 1, 4)):
        mask = drop_lowest(scores.view(-1, block), removed).view(scores.shape)
        assert torch.equal(~mask, golden[f"gone_{pattern}_down"])


def test_score_follows_the_formula():
    g = torch.Generator().manual_seed(0)
    W, norms = torch.randn(4, 3, generator=g), torch.rand(4, generator=g)
    for alpha in (0.0, 0.5, 1.0):
        plain = [[abs(W[i, j]) * norms[i] ** alpha for j in range(3)] for i in range(4)]
        torch.testing.assert_close(maker_score(W, norms, alpha), torch.tensor(plain))


def test_channels_alike_leave_the_size_of_the_weights_to_decide():
    W = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    mask = along_columns(maker_score(W, torch.full((16,), 3.0)), 8)
    assert torch.equal(mask, along_columns(W.abs(), 8))
    assert (~mask).sum(0).tolist() == [8] * 5


def test_a_larger_channel_never_keeps_fewer_weights():
    g = torch.Generator().manual_seed(2)
    W, norms = torch.randn(16, 40, generator=g), torch.rand(16, generator=g) + 0.1
    before = along_columns(maker_score(W, norms), 8).sum(1)
    for i in range(16):
        more = norms.clone()
        more[i] *= 2
        assert along_columns(maker_score(W, more), 8)[i].sum() >= before[i]
    rank = torch.stack([norms.argsort().argsort(), before]).float()
    assert torch.corrcoef(rank)[0, 1] > 0.5


def test_it_beats_wanda_where_few_channels_carry_the_output():
    """Card 9: lower error of the FFN's output on a gated FFN with skewed channels."""
    won = 0
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        X = torch.randn(400, 32, generator=g) * torch.rand(32, generator=g).mul(2).exp()
        skew = torch.randn(96, 1, generator=g).exp()
        gate, up = (torch.randn(96, 32, generator=g) * skew**0.5 for _ in range(2))
        down = torch.randn(32, 96, generator=g)

        def out(gate, up, X=X, down=down):
            return (torch.nn.functional.silu(X @ gate.T) * (X @ up.T)) @ down.T

        z = torch.nn.functional.silu(X @ gate.T) * (X @ up.T)
        ours = [W * along_columns(maker_score(W, z.norm(dim=0)), 48) for W in (gate, up)]
        wanda = [W * drop_lowest(wanda_score(W, X.norm(dim=0)), 16) for W in (gate, up)]
        dense = out(gate, up)
        won += (out(*ours) - dense).norm() < (out(*wanda) - dense).norm()
    assert won == 5
