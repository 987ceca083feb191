"""Batches over processes, and the schedule of the learning rate."""

from __future__ import annotations

import pytest

from prunekit.errors import ConfigError
from prunekit.training.recipe import linear_decay, micro_batches


def test_several_processes_share_the_batch(monkeypatch):
    assert micro_batches(64, 4) == 16
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert micro_batches(64, 4) == 4
    with pytest.raises(ConfigError, match="batch=8 is no multiple of micro_batch=4 x 4 processes"):
        micro_batches(8, 4)


def test_the_rate_rises_and_falls_linearly():
    assert [linear_decay(s, 2, 6) for s in range(7)] == [0, 0.5, 1, 0.75, 0.5, 0.25, 0]
    assert [linear_decay(s, 0, 2) for s in range(3)] == [1, 0.5, 0]
