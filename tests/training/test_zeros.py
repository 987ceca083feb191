"""Zeros that stay: masks on parameters and on their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunekit.training.zeros import apply_masks, held_at_zero


def test_masked_elements_are_zero_and_get_no_gradient():
    layer = nn.Linear(4, 3)
    before = layer.weight.detach().clone()
    mask = torch.arange(12).view(3, 4) % 2 == 0
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    with held_at_zero(layer, {"weight": mask}):
        assert torch.equal(layer.weight.detach(), before * mask)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(5, 4)).square().sum().backward()
            assert not layer.weight.grad[~mask].any()
            assert layer.weight.grad[mask].all()
            assert layer.bias.grad.all()
            optimizer.step()
            assert not layer.weight[~mask].any()
    assert not torch.equal(layer.weight[mask], before[mask])
    layer.zero_grad()
    layer(torch.randn(5, 4)).square().sum().backward()
    assert layer.weight.grad[~mask].any(), "the hooks are gone"


def test_frozen_parameters_are_masked_too():
    layer = nn.Linear(4, 3).requires_grad_(False)
    mask = torch.zeros(3, dtype=torch.bool)
    with held_at_zero(layer, {"bias": mask}):
        assert not layer.bias.any()
    layer.bias.fill_(1)
    apply_masks(layer, {"bias": mask})
    assert not layer.bias.any()


@pytest.mark.parametrize("mask", [torch.ones(4), torch.ones(3, dtype=torch.bool)])
def test_a_mask_that_does_not_fit_is_refused(mask):
    layer = nn.Linear(2, 4)
    for bad in ({"bias": mask}, {"bias": mask.bool()[:2]}):
        with pytest.raises(ValueError, match=r"the mask of bias must be bool \(4,\), got"):
            apply_masks(layer, bad)
