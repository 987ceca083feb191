"""What the learned masks' tests share."""

from __future__ import annotations

import pytest
import torch

from prunekit.training.learned_masks import LearnedMasks


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
