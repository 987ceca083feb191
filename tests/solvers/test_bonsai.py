"""Complementary masks, and a utility that adds up, recovered from what they show."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kendalltau

from prunekit.solvers.bonsai import draw_pair, regress


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def drawn(prior, candidates, count, generator, pairs):
    """(2 pairs, U), 1 where a unit is there. Without a `count` it varies from pair to pair."""
    there = torch.ones(2 * pairs, len(prior))
    for i in range(pairs):
        first = int(torch.randint(len(candidates) + 1, (), generator=generator))
        counts = (first, len(candidates) - first) if count is None else (count, count)
        for row, off in enumerate(draw_pair(prior, candidates, *counts, generator)):
            there[2 * i + row, off] = 0
    return there


@pytest.mark.parametrize("count", [3, None])
def test_each_candidate_is_on_once_in_a_pair_and_every_other_unit_twice(generator, count):
    prior, candidates = torch.rand(30, generator=generator), torch.tensor([3, 5, 8, 13, 21, 22])
    there = drawn(prior, candidates, count, generator, 50).view(50, 2, 30).sum(1)
    assert (there[:, candidates] == 1).all()
    assert there.sum() == 50 * (60 - 6)


def test_of_more_candidates_two_sets_apart_are_drawn(generator):
    there = drawn(torch.arange(9.0), torch.arange(7), 2, generator, 50)
    assert (there.sum(1) == 7).all()
    assert (there.view(50, 2, 9).sum(1) >= 1).all()
    assert (there[:, 7:] == 1).all()
    none, also = draw_pair(torch.arange(9.0), torch.arange(7), 0, 0, generator)
    assert len(none) == len(also) == 0
    with pytest.raises(ValueError, match="4 and 4 of 7"):
        draw_pair(torch.arange(9.0), torch.arange(7), 4, 4, generator)


def test_what_has_a_low_prior_goes_first_more_often(generator):
    prior = torch.cat([torch.zeros(5), torch.full((5,), 0.9), torch.ones(10)])
    first = drawn(prior, torch.arange(10), 5, generator, 400)[::2]
    low, high = (1 - first[:, :5]).mean(), (1 - first[:, 5:10]).mean()
    assert low > 0.8
    assert high < 0.2


def test_equal_priors_are_drawn_alike(generator):
    first = drawn(torch.ones(4), torch.arange(4), 2, generator, 400)[::2]
    assert ((first.mean(0) - 0.5).abs() < 0.1).all()


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("count", [10, None])
def test_a_utility_that_adds_up_is_recovered(generator, count, noise):
    """60 units of three modules. Where each mask takes as many of each, what the modules are worth
    beside each other cannot show, and only the order inside of them is told.
    """
    worth = torch.rand(60, generator=generator)
    parts = [drawn(torch.ones(20), torch.arange(20), count, generator, 100) for _ in range(3)]
    there = torch.cat(parts, 1)
    outcomes = there @ worth - 3 + noise * torch.randn(200, generator=generator)
    fit = regress(there, outcomes)
    compared = [slice(0, 60)] if count is None else [slice(i, i + 20) for i in (0, 20, 40)]
    for units in compared:
        assert kendalltau(fit.worth[units], worth[units]).statistic > 0.9
    assert fit.tau > 0.8


def test_a_few_units_that_matter_are_found_among_many(generator):
    """More units than masks: what the L1 penalty is for."""
    there = drawn(torch.ones(400), torch.arange(400), 200, generator, 50)
    outcomes = there[:, [7, 70, 300]].sum(1)
    fit = regress(there, outcomes)
    assert sorted(fit.worth.topk(3).indices.tolist()) == [7, 70, 300]
    assert (fit.worth == 0).float().mean() > 0.8


def test_outcomes_that_are_all_alike_say_nothing(generator):
    there = drawn(torch.ones(8), torch.arange(8), 4, generator, 10)
    fit = regress(there, torch.ones(20))
    assert (fit.worth == 0).all()
    assert fit.tau == 0
