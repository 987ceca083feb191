"""Precisions by what a device is quick at, and activations on a disk that is full."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from reference import tiny_llama

from prunekit.activations import storage
from prunekit.activations.block_inputs import capture_inputs
from prunekit.activations.storage import Activations, PassOptions, resolved


@pytest.mark.parametrize(("quick", "found"), [(True, "bf16"), (False, "model")])
def test_fast_is_bfloat16_where_the_device_is_quick_at_it(monkeypatch, tokens, quick, found):
    monkeypatch.setattr(storage, "quick_in_bfloat16", lambda device: quick)
    cpu = torch.device("cpu")
    assert resolved("fast", cpu) == found
    assert [resolved(p, cpu) for p in ("model", "bf16")] == ["model", "bf16"]
    model = tiny_llama()
    _, feed = capture_inputs(
        model, ("model.layers.0", "model.layers.1"), tokens, PassOptions(precision="fast")
    )
    assert feed.precision == found


def test_a_full_disk_is_an_error_before_anything_is_mapped(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert Activations(2, torch.ones(1, 3, 4), "disk")[slice(0, 2)].shape == (2, 3, 4)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Activations(2, torch.ones(1, 3, 4), "disk")
