"""Exclusions narrow the blocks that may go as a whole."""

from __future__ import annotations

import pytest
from blocks import blocks
from reference import tiny_llama

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
