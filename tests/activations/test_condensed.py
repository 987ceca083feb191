"""What is kept of a distribution, and what is known of the KL from it: against all of both."""

from __future__ import annotations

import pytest
import torch

from prunekit.activations.condensed import check_vocabulary, compare, condense
from prunekit.errors import ConfigError


@pytest.fixture
def pair():
    rng = torch.Generator().manual_seed(0)
    p, noise = (torch.randn(40, 97, generator=rng, dtype=torch.float64) for _ in range(2))
    return (3 * p).log_softmax(-1), (3 * p + noise).log_softmax(-1)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("top", [1, 5, 30, 96])
def test_the_kl_is_at_least_what_is_said_and_short_of_it_by_at_most_the_gap(pair, top):
    found, true = compare(condense(pair[0], top), pair[1].clone()), kl(*pair)
    assert (found["kl"] <= true + 1e-12).all()
    assert (true <= found["kl"] + found["kl_gap"] + 1e-12).all()
    overlap = torch.minimum(pair[0].exp(), pair[1].exp()).sum(-1)
    assert (overlap <= found["acceptance"] + 1e-12).all()
    assert (found["acceptance"] <= overlap + found["acceptance_gap"] + 1e-12).all()


@pytest.mark.parametrize("top", [97, 1000])
def test_with_every_token_nothing_is_missing(pair, top):
    found = compare(condense(pair[0], top), pair[1].clone())
    assert torch.allclose(found["kl"], kl(*pair), atol=1e-12)
    assert not found["kl_gap"].any()
    assert not found["acceptance_gap"].any()


def test_a_distribution_beside_itself(pair):
    found = compare(condense(pair[0], 7), pair[0].clone())
    assert found["kl"].abs().max() < 1e-12
    assert (found["top1"] == 1).all()
    assert found["acceptance"] == pytest.approx(1.0)


def test_tokens_that_tie_for_the_first_place_agree():
    both = torch.tensor([[0.4, 0.4, 0.2]]).log()
    assert (
        compare(condense(torch.tensor([[0.5, 0.3, 0.2]]).log(), 1), both.clone())["top1"].item()
        == 1
    )
    assert (
        compare(condense(torch.tensor([[0.3, 0.5, 0.2]]).log(), 1), both.clone())["top1"].item()
        == 1
    )
    assert (
        compare(condense(torch.tensor([[0.3, 0.2, 0.5]]).log(), 1), both.clone())["top1"].item()
        == 0
    )


def test_a_token_that_became_impossible_is_no_infinity():
    log_q = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    found = compare(condense(torch.tensor([[0.5, 0.3, 0.2]]).log(), 1), log_q)
    assert all(v.isfinite().all() for v in found.values())


def test_another_vocabulary_is_refused(pair):
    with pytest.raises(ConfigError, match="vocabulary"):
        check_vocabulary(condense(pair[0], 97), 50)


@pytest.mark.parametrize("top", [1, 5, 96])
def test_what_is_kept_of_a_distribution(pair, top):
    """By the definitions, on probabilities so small that float32 would have none."""
    log_p = torch.cat([pair[0], (40 * pair[0]).log_softmax(-1)])
    kept = condense(log_p, top)
    ordered, order = log_p.sort(-1, descending=True)
    assert torch.equal(kept["ids"], order[:, :top].int())
    assert torch.equal(kept["log_p"], ordered[:, :top])
    rest = ordered[:, top:]
    assert torch.allclose(kept["log_tail"], rest.logsumexp(-1), rtol=1e-12)
    assert torch.allclose(kept["tail"], (rest.exp() * rest).sum(-1), rtol=1e-9, atol=1e-300)
