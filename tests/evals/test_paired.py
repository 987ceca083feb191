"""Flips of paired answers, by hand and against scipy's and a plain formula."""

from __future__ import annotations

import math

import pytest
import torch

from prunekit.evals.paired import of_zeros_and_ones, paired


def test_numbers_by_hand():
    before = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    after = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0])
    found = paired(before, after)
    assert found["flips"] == 0.5
    assert found["flips_to_wrong"] == 0.375
    assert found["flips_to_right"] == 0.125
    assert found["change"] == -0.25
    variance = (4 - 2**2 / 8) / 7  # of -1, -1, -1, 1 and four zeros
    assert found["change_stderr"] == pytest.approx(math.sqrt(variance / 8))
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 4) / 16)  # 0 or 1 of four coins


def test_nothing_flips_between_a_model_and_itself():
    items = torch.tensor([1, 0, 1])
    assert paired(items, items) == {
        "flips": 0,
        "flips_to_wrong": 0,
        "flips_to_right": 0,
        "change": 0,
        "change_stderr": 0,
        "mcnemar_p": 1,
    }


def test_the_same_accuracy_may_hide_flips():
    found = paired(torch.tensor([1, 0]), torch.tensor([0, 1]))
    assert (found["change"], found["flips"], found["mcnemar_p"]) == (0, 1, 1)


def test_one_item_has_no_error_and_other_items_are_refused():
    assert paired(torch.tensor([1]), torch.tensor([0]))["change_stderr"] == 0
    with pytest.raises(ValueError, match="items beside"):
        paired(torch.ones(3), torch.ones(2))


def test_only_right_or_wrong_can_flip():
    assert of_zeros_and_ones([1.0, 0.0]) is not None
    assert of_zeros_and_ones([0.5, 1.0]) is None
