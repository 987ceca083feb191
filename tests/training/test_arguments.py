"""What the Trainer is told beside the recipe."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from prunekit.training.arguments import arguments
from prunekit.training.recipe import Recipe


@pytest.fixture
def chosen(monkeypatch):
    """Devices that were made the current one; accelerate forgets them afterwards."""
    seen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    yield seen
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_on_a_second_device_is_trained_there(chosen, tmp_path):
    there = torch.device("cuda:1")
    args = arguments(Recipe(lr=1e-3), str(tmp_path), torch.float32, there, False)
    assert args.device == there
    assert Accelerator().device == there
    assert chosen == [there]


def test_nothing_is_chosen_for_a_model_on_the_cpu(chosen, tmp_path):
    args = arguments(Recipe(lr=1e-3), str(tmp_path), torch.float32, torch.device("cpu"), False)
    assert args.device == torch.device("cpu")
    assert chosen == []
