"""Which units stay: exact, stable, never emptying a group."""

from __future__ import annotations

import pytest
import torch

from prunekit.errors import ConfigError
from prunekit.selection.units import keep_local, keep_pooled, without


def test_lowest_is_exact_and_stable_with_ties():
    assert without(torch.tensor([1.0, 1.0, 1.0, 0.0]), 2).tolist() == [
        False,
        True,
        True,
        False,
    ]
    assert without(torch.zeros(5), 0).all()


def test_local_never_empties():
    kept = keep_local({"a": torch.arange(4.0)}, {"a": 4})
    assert kept["a"].tolist() == [False, False, False, True]


def test_masks_are_nested_in_the_count():
    s = {"a": torch.rand(50, generator=torch.Generator().manual_seed(0))}
    small, large = keep_local(s, {"a": 10}), keep_local(s, {"a": 30})
    assert not (large["a"] & ~small["a"]).any()


def test_pooled_ranks_across_groups_and_spares_the_best_of_each():
    scores = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([1.0, 2.0, 3.0])}
    kept = keep_pooled(scores, lambda c: sum(c.values()) <= 4)
    assert {n: int((~k).sum()) for n, k in kept.items()} == {"a": 2, "b": 2}
    assert kept["a"][2]
    assert kept["b"][2]


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ConfigError, match="neurons.1"):
        keep_local({"neurons.1": torch.tensor([1.0, torch.nan])}, {"neurons.1": 1})
