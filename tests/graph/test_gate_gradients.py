"""Gradients to z: of plain multiplication, of finite differences, and of recomputed blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from gates import TOKENS, random_z
from torch import Tensor, nn

from prunekit.architecture.matrices import matrices
from prunekit.graph import discover, gated


def test_elements_of_a_matrix_with_gradients_to_z_and_to_the_weight(
    architecture: nn.Module,
) -> None:
    groups = matrices(architecture)
    z = {n: v.requires_grad_() for n, v in random_z(groups, "weights").items()}
    by_hand = copy.deepcopy(architecture).requires_grad_(True)
    weights = {g.name: by_hand.get_parameter(g.matrix) for g in groups}
    with torch.no_grad():
        for name, weight in weights.items():
            weight *= z[name]
    by_hand(input_ids=TOKENS).logits.square().mean().backward()
    architecture.requires_grad_(True)
    with gated(architecture, groups, z):
        architecture(input_ids=TOKENS).logits.square().mean().backward()
    for g in groups:
        weight, grad = architecture.get_parameter(g.matrix), weights[g.name].grad
        assert torch.allclose(weight.grad, grad * z[g.name], atol=1e-5)
        assert torch.allclose(z[g.name].grad, grad * weight, atol=1e-5)
    architecture.requires_grad_(False)
    architecture.zero_grad()


@pytest.mark.parametrize("kind", ["neurons", "heads", "hidden", "blocks"])
def test_gradients_equal_finite_differences(architecture: nn.Module, kind: str) -> None:
    check_gradients(architecture, kind)


@pytest.mark.parametrize("kind", ["experts", "neurons", "hidden"])
def test_gradients_of_experts_equal_finite_differences(mixtral: nn.Module, kind: str) -> None:
    """Steps are small, so that no token changes its experts."""
    check_gradients(mixtral, kind, step=3e-4)


def check_gradients(model: nn.Module, kind: str, step: float = 1e-2) -> None:
    """Along each gate's gradient, so that the slope is large against the rounding of float32."""
    groups = discover(model)
    z = {n: 0.1 + 0.8 * v for n, v in random_z(groups, kind).items()}

    def loss(z: dict[str, Tensor]) -> Tensor:
        with gated(model, groups, z):
            return model(input_ids=TOKENS).logits.square().mean()

    leaves = {n: v.clone().requires_grad_() for n, v in z.items()}
    loss(leaves).backward()
    draw = torch.Generator().manual_seed(3)
    towards = {n: v.grad.sign() * torch.rand(v.shape, generator=draw) for n, v in leaves.items()}
    slope = sum(float((v.grad * towards[n]).sum()) for n, v in leaves.items())
    with torch.no_grad():
        up, down = (
            float(loss({n: v + by * towards[n] for n, v in z.items()})) for by in (step, -step)
        )
    assert slope > 1e-3
    assert slope == pytest.approx((up - down) / (2 * step), rel=1e-2)


def test_recomputed_activations_are_gated_too(llama: nn.Module) -> None:
    groups = discover(llama) + matrices(llama)
    grads = []
    for checkpointing in (False, True):
        model = copy.deepcopy(llama).requires_grad_(True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        z = {k: v for kind in ("weights", "heads") for k, v in random_z(groups, kind).items()}
        z = {k: v.requires_grad_() for k, v in z.items()}
        with gated(model, groups, z):
            model(input_ids=TOKENS).logits.square().mean().backward()
        grads.append(
            {
                **{n: p.grad for n, p in model.named_parameters()},
                **{n: v.grad for n, v in z.items()},
            }
        )
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])
