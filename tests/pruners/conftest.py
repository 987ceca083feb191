"""What the pruners' tests share: a text, and what a model with its final masks on says."""

from __future__ import annotations

import pytest
import torch

from prunekit.training.learned_masks import LearnedMasks


@pytest.fixture
def text():
    """(16, 32) token ids below 100."""
    return torch.randint(8, 100, (16, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masked(tokens, monkeypatch):
    """Under `logits` what a model with its final masks on says of `tokens`, once it was pruned."""
    seen, hold = {}, LearnedMasks.hold

    def held(masks, kept):
        hold(masks, kept)
        with masks.on_model(), torch.no_grad():
            seen["logits"] = masks.model(tokens).logits

    monkeypatch.setattr(LearnedMasks, "hold", held)
    return seen
