"""Which elements of a matrix go: exact counts, the lowest of each scope, N of every M, and the
rules of the papers by brute force.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from prunekit.errors import ConfigError
from prunekit.selection.elements import (
    NM,
    SCOPES,
    Pattern,
    by_alpha,
    check_pattern,
    drop_lowest,
    everywhere,
    floor_share,
    of_each_run,
)
from prunekit.types import Group


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 9), st.data())
def test_lowest_is_a_stable_sort(rows, columns, data):
    n = data.draw(st.integers(0, columns))
    scores = (
        torch.tensor(
            data.draw(st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns))
        )
        .view(rows, columns)
        .float()
    )
    expected = torch.ones(rows, columns, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        expected[i, sorted(range(columns), key=lambda j: row[j])[:n]] = False
    assert torch.equal(drop_lowest(scores, n), expected)


@pytest.mark.parametrize(
    ("part", "units"), [(0.29, 100), (0.1, 30), (0.5, 7), (0.7, 884_736), (0.0, 5)]
)
def test_shares_are_floored(part, units):
    assert floor_share(units, part) == math.floor(round(part * units, 6))


@pytest.mark.parametrize("scope", [*SCOPES, "model"])
def test_counts_are_exact_and_what_goes_is_lowest_and_nested(scope):
    scores = drawn(12, 40)
    masks = []
    for part in (0.3, 0.6):
        count = floor_share(480, part)
        mask = (
            everywhere({"a": scores}, count)["a"]
            if scope == "model"
            else SCOPES[scope](scores, count)
        )
        assert int((~mask).sum()) == count
        masks.append(mask)
        for s, m in (
            [(scores, mask)] if scope in ("matrix", "model") else zip(scores, mask, strict=True)
        ):
            if not m.all():
                assert s[m].min() >= s[~m].max()
    assert not (masks[1] & ~masks[0]).any()


def test_all_matrices_compete_in_the_model_scope():
    scores = {"a": drawn(4, 8), "b": drawn(3, 5, seed=1) + 2, "c": drawn(2, 2, seed=2)}
    kept = everywhere(scores, 34)
    assert sum(int((~m).sum()) for m in kept.values()) == 34
    flat = torch.cat([s.flatten() for s in scores.values()])
    assert torch.equal(
        torch.cat([m.flatten() for m in kept.values()]), flat > flat.sort().values[33]
    )


@pytest.mark.parametrize(("keep", "length"), [(2, 4), (4, 8), (1, 4)])
def test_every_run_of_inputs_has_its_zeros(keep, length):
    scores = drawn(6, 32)
    mask = of_each_run(scores, keep, length)
    assert (mask.view(6, -1, length).sum(-1) == keep).all()
    for s, m in zip(scores.view(-1, length), mask.view(-1, length), strict=True):
        assert s[m].min() >= s[~m].max()


def test_alpha_is_the_papers_bisection():
    scores, target = drawn(16, 64) ** 3, 0.5
    ordered, order = scores.sort(dim=1)
    sums = ordered.cumsum(1)
    low, high = 0.0, 0.8
    for _ in range(50):
        alpha = (low + high) / 2
        fits = sums <= alpha * sums[:, -1:]
        low, high = (alpha, high) if fits.float().mean() <= target else (low, alpha)
    paper = torch.ones_like(fits).scatter_(1, order, ~(sums <= low * sums[:, -1:]))
    mask = by_alpha(scores, 512)
    assert (mask != paper).sum() <= 1
    assert len(set(mask.sum(1).tolist())) > 1


@pytest.mark.parametrize(
    ("text", "pattern"), [("2:4", Pattern(2, 4)), ("N:8", Pattern(None, 8)), (None, None)]
)
def test_patterns_are_written_as_n_of_m(text, pattern):
    assert TypeAdapter(NM).validate_python(text) == pattern


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2", "no pattern such as '2:4'"),
        ("2:", "no pattern such as '2:4'"),
        (24, "no pattern such as '2:4'"),
        ("4:4", "one must go"),
        ("0:4", "at least one must stay"),
        ("N:1", "of M >= 2"),
    ],
)
def test_half_a_pattern_is_refused(text, says):
    with pytest.raises(ValidationError, match=says):
        TypeAdapter(NM).validate_python(text)


@pytest.mark.parametrize(
    ("text", "share", "says"),
    [
        ("2:4", 0.4, r"2:4 removes 0.5 of each matrix, but the ratio asks for 0.4 of W"),
        ("N:4", 0.9, r"N:4 would leave nothing of W, of which the ratio takes 0.9"),
    ],
)
def test_a_pattern_and_a_ratio_that_disagree_are_refused(text, share, says):
    pattern = TypeAdapter(NM).validate_python(text)
    with pytest.raises(ConfigError, match=says):
        pattern.kept_of(round(share * 640), 640, "W")


def test_a_pattern_that_takes_nothing_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    group = Group("W", "weights", 0, 64, matrix="0.weight")
    check_pattern(model, [group], {"W": 8}, Pattern(None, 8))
    with pytest.raises(ConfigError, match="N:8 takes nothing where the ratio asks for less than"):
        check_pattern(model, [group], {"W": 3}, Pattern(None, 8))
