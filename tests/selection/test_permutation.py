"""Orders of input channels for N:M against plain searches and against the authors' numbers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from paths import GOLDEN
from scipy.optimize import linear_sum_assignment

from prunekit.selection.permutation import assign, deal, kept_score, permutation

PATTERNS = [("24", 2, 4), ("48", 4, 8)]


@pytest.fixture(scope="module")
def golden():
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "ria.npz").items() if v.ndim}


def scores_of(seed: int, rows: int = 6, inputs: int = 24) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, inputs, generator=g) * torch.rand(inputs, generator=g).exp()


def gone(scores, order, keep, block):
    """What N:M removes in this order, said in the original one."""
    runs = scores[:, order].view(-1, block)
    mask = torch.zeros_like(runs, dtype=torch.bool)
    mask.scatter_(1, runs.topk(block - keep, largest=False).indices, True)
    out = torch.empty_like(scores, dtype=torch.bool)
    out[:, order] = mask.view(scores.shape)
    return out


@pytest.mark.parametrize(("name", "keep", "block"), PATTERNS)
@pytest.mark.parametrize("by", ["sum", "degmat", "degrow"])
def test_dealing_is_the_authors(golden, name, keep, block, by):
    scores = golden["metric_a05"]
    removed = {"degmat": golden["gone_matrix_50"], "degrow": golden["gone_row_50"]}
    strength = scores.masked_fill(removed[by], 0) if by != "sum" else scores
    order = deal(strength.sum(0), block)
    assert torch.equal(gone(scores, order, keep, block), golden[f"heur_{name}_{by}_gone"])
    before, after = golden[f"heur_{name}_{by}_scores"].tolist()
    assert kept_score(scores, torch.arange(96), keep, block) == pytest.approx(before, rel=1e-6)
    assert kept_score(scores, order, keep, block) == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize(("name", "keep", "block"), PATTERNS)
@pytest.mark.parametrize("parts", [1, 4])
def test_assignment_keeps_what_the_authors_keeps(golden, name, keep, block, parts):
    scores = golden["metric_a05"]
    theirs = golden[f"lsa_{name}{'_fast' if parts > 1 else ''}_scores"][-1].item()
    order = assign(scores, deal(scores.sum(0), block), keep, block, parts=parts)
    assert kept_score(scores, order, keep, block) >= theirs - 1e-4


def values(scores, places, k, keep):
    """Card 4, step 2: what each run would keep with each channel in place k, counted out."""
    rest = [j for j in range(places.shape[1]) if j != k]
    value = np.zeros((len(places), len(places)))
    for g, run in enumerate(places):
        for c, channel in enumerate(places[:, k]):
            here = scores[:, [*run[rest].tolist(), int(channel)]]
            value[g, c] = here.topk(keep, dim=1).values.sum()
    return value


def best(value):
    return linear_sum_assignment(value, maximize=True)


@pytest.mark.parametrize(("keep", "block"), [(2, 4), (3, 4), (4, 8)])
def test_assignment_is_the_plain_one(keep, block):
    for seed in range(3):
        scores = scores_of(seed, rows=30)  # with few rows orders tie
        places = torch.arange(24).view(-1, block).clone()
        for k in range(block):
            chosen = torch.from_numpy(best(values(scores, places, k, keep))[1])
            places[:, k] = places[chosen, k]
        assert torch.equal(assign(scores, torch.arange(24), keep, block), places.reshape(-1))


@pytest.mark.parametrize(("keep", "block"), [(1, 4), (2, 4), (3, 4), (4, 8)])
def test_the_last_place_is_dealt_the_best_way_there_is(keep, block):
    for seed in range(3):
        scores = scores_of(seed)
        order = assign(scores, torch.arange(24), keep, block)
        value = values(scores, order.view(-1, block), block - 1, keep)
        assert kept_score(scores, order, keep, block) == pytest.approx(
            value[best(value)].sum(), rel=1e-6
        )


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_an_order_is_a_permutation_and_no_pass_loses(parts):
    for seed in range(5):
        scores, kept = scores_of(seed, inputs=40), []
        for passes in (0, 1, 2, 5):
            order = assign(scores, torch.arange(40), 2, 4, parts=parts, passes=passes)
            assert order.sort().values.tolist() == list(range(40))
            kept.append(kept_score(scores, order, 2, 4))
        assert kept == sorted(kept)
        assert kept[-1] > kept[0]


def test_channels_stay_in_their_part():
    order = assign(scores_of(0, inputs=36), torch.arange(36), 2, 4, parts=2, passes=3)
    assert order[:16].sort().values.tolist() == list(range(16))


def test_two_runs_reach_what_all_orders_reach():
    for seed in range(20):
        scores = scores_of(seed, inputs=8)
        most = max(
            kept_score(scores, torch.tensor([*c, *(set(range(8)) - set(c))]), 2, 4)
            for c in combinations(range(8), 4)
        )
        order = permutation(scores, 2, 4)
        assert kept_score(scores, order, 2, 4) >= 0.95 * most
        assert kept_score(scores, order, 2, 4) >= kept_score(scores, torch.arange(8), 2, 4)


def test_the_best_of_three_is_never_worse_than_leaving_all_in_place():
    worse = 0
    for seed in range(30):
        scores = scores_of(seed, inputs=8)
        start = kept_score(scores, torch.arange(8), 2, 4)
        worse += kept_score(scores, deal(scores.sum(0), 4), 2, 4) < start - 1e-9
        assert kept_score(scores, permutation(scores, 2, 4), 2, 4) >= start
    assert worse  # dealing alone can be worse, which is why the best is taken


def test_channels_that_are_alike_stay_where_they_are():
    assert torch.equal(permutation(torch.ones(3, 16), 2, 4), torch.arange(16))
