"""Which groups exclusions leave, counted from the ends of the model."""

from __future__ import annotations

import pytest
from blocks import blocks
from foreign import ListedMixtral
from problems import problem
from reference import tiny_llama
from tiny_models import tiny_model

from prunekit import graph
from prunekit.errors import ConfigError
from prunekit.excludes.ranges import ends, layer_range
from prunekit.selection.eligible import apply_exclusion

L = 6


@pytest.fixture
def model():
    return tiny_llama(num_hidden_layers=L)


def test_exclusions_narrow_the_blocks(model):
    group = blocks(model)
    assert ends([group], first=1, last=2)[0].modules == tuple(
        f"model.layers.{i}" for i in (1, 2, 3)
    )
    assert layer_range([group], blocks=[2, 4])[0].modules == ("model.layers.2", "model.layers.3")
    assert ends([group], first=5, last=3) == []
    with pytest.raises(ConfigError, match=r"leaves nothing of 1 groups.*exclude=none"):
        apply_exclusion([group], lambda groups: ends(groups, first=5, last=3))
    assert layer_range([group], heads=[0, 0], neurons=[0, 0]) == [group]


def test_experts_of_a_list_are_no_blocks():
    groups = [g for g in graph.discover(ListedMixtral()) if g.kind == "experts"]
    assert [g.layer for g in groups] == [0, 1, 2]
    assert ends(groups, first=1, last=1) == [groups[1]]
    assert layer_range(groups, blocks=[0, 2], neurons=[1, 3]) == groups[1:]


@pytest.fixture(scope="module")
def hybrid():
    """Jamba of four blocks; attention in 0 and 2."""
    return tiny_model("jamba", 4, meta=True, attn_layer_period=2, attn_layer_offset=0)


def spared_the_last(model):
    return problem(model, exclude={"name": "ends", "first": 0, "last": 1})


def test_the_last_block_is_the_models_not_the_last_with_such_units(hybrid):
    assert [g.layer for g in spared_the_last(hybrid).groups(["heads"])] == [0, 2]
    assert [g.layer for g in spared_the_last(hybrid).groups(["neurons"])] == [0, 1, 2]


def test_the_last_block_is_the_models_not_the_last_with_such_matrices(hybrid):
    assert [g.layer for g in spared_the_last(hybrid).matrices(["q_proj"])] == [0, 2]


def test_a_range_may_reach_the_models_end_beyond_the_last_attention(hybrid):
    whole = problem(hybrid, exclude={"name": "range", "heads": [1, 4]})
    assert [g.name for g in whole.groups(["heads"])] == ["heads.2"]
    beyond = problem(hybrid, exclude={"name": "range", "heads": [1, 5]})
    with pytest.raises(ConfigError, match="the model has 4 blocks"):
        beyond.groups(["heads"])
