"""RIA's score against its formula written plainly, and against the authors' numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from paths import GOLDEN

from prunekit.scoring.ria import relative_importance, ria_score
from prunekit.selection.elements import drop_lowest, per_matrix, per_row


@pytest.fixture(scope="module")
def golden():
    found = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "ria.npz").items() if v.ndim}
    norms = found["X"].square().sum((0, 1)).div(len(found["X"])).sqrt()
    return found | {"norms": norms}


def plain(W, norms, a):
    """Card 4 of unstructured.md, element by element."""
    out = torch.zeros_like(W)
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            w = abs(W[i, j])
            out[i, j] = (w / W[:, j].abs().sum() + w / W[i].abs().sum()) * norms[j] ** a
    return out


def test_score_follows_the_formula():
    g = torch.Generator().manual_seed(0)
    W, norms = torch.randn(5, 7, generator=g), torch.rand(7, generator=g) + 0.1
    for a in (0.0, 0.5, 1.0):
        torch.testing.assert_close(ria_score(W, norms, a), plain(W, norms, a))


@pytest.mark.parametrize(("name", "a"), [("a00", 0.0), ("a05", 0.5), ("a10", 1.0)])
def test_score_is_the_authors(golden, name, a):
    found = ria_score(golden["W"], golden["norms"], a)
    torch.testing.assert_close(found, golden[f"metric_{name}"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("share", [50, 70])
def test_masks_are_the_authors(golden, share):
    scores = ria_score(golden["W"], golden["norms"])
    removed = scores.numel() * share // 100 + 1  # theirs is one weight more than the share
    assert torch.equal(~per_matrix(scores, removed), golden[f"gone_matrix_{share}"])
    removed = int(golden[f"gone_row_{share}"][0].sum()) * len(scores)
    assert torch.equal(~per_row(scores, removed), golden[f"gone_row_{share}"])


@pytest.mark.parametrize(("pattern", "block"), [("24", 4), ("48", 8)])
def test_patterns_are_the_authors(golden, pattern, block):
    scores = ria_score(golden["W"], golden["norms"])
    mask = drop_lowest(scores.view(-1, block), block // 2).view(scores.shape)
    assert torch.equal(~mask, golden[f"gone_{pattern}"])


def test_shares_of_a_matrix_add_up_to_its_sides_whatever_its_scale():
    W = torch.randn(6, 11, generator=torch.Generator().manual_seed(1))
    assert relative_importance(W).sum() == pytest.approx(17, rel=1e-6)
    torch.testing.assert_close(relative_importance(1000 * W), relative_importance(W))


def test_an_empty_column_scores_zero_and_not_nan():
    W = torch.ones(3, 4)
    W[:, 2] = 0
    found = ria_score(W, torch.ones(4))
    assert torch.isfinite(found).all()
    assert not found[:, 2].any()
