"""`gated`: units multiplied by z while the model runs: zeros remove, and nothing is left of it
afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from gates import TOKENS, logits, off, random_masks, random_z
from torch import Tensor, nn

from prunekit.architecture.matrices import matrices, zero_elements
from prunekit.errors import ConfigError
from prunekit.graph import discover, gated, remove, zero
from prunekit.graph.discovery import discovery


def hooks_of(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("kind", ["neurons", "heads", "hidden", "blocks"])
def test_zeros_equal_zeroing_and_removing(architecture: nn.Module, kind: str) -> None:
    """RMSNorms over removed channels are rescaled; LayerNorms have no such correction."""
    groups = discover(architecture)
    kept = random_masks(groups, kind)
    dense = logits(architecture)
    with gated(architecture, groups, {n: m.float() for n, m in kept.items()}):
        got = logits(architecture)
    zeroed = logits(zero(copy.deepcopy(architecture), kept))
    assert off(zeroed, dense) > 1e-2
    assert off(got, zeroed) < 1e-5
    if kind != "hidden" or not any(isinstance(m, nn.LayerNorm) for m in architecture.modules()):
        removed = remove(copy.deepcopy(architecture), kept, norm="rescale")
        assert off(got, logits(removed)) < 1e-5


@pytest.mark.parametrize("kind", ["neurons", "heads", "hidden", "blocks"])
def test_ones_are_the_model_itself(architecture: nn.Module, kind: str) -> None:
    groups = discover(architecture)
    ones = {n: torch.ones(len(m)) for n, m in random_masks(groups, kind).items()}
    dense = logits(architecture)
    with gated(architecture, groups, ones):
        assert torch.equal(logits(architecture), dense)


def test_zeros_equal_zeroing_and_removing_where_units_pass_norms_and_routers(
    passing_norms_and_routers: nn.Module,
) -> None:
    """Experts are not zeroed but removed: the statistics of their router run over those that
    stay.
    """
    model, found = passing_norms_and_routers, discovery(passing_norms_and_routers)
    kinds = {g.kind for g in found.groups}
    assert kinds >= {"neurons", "heads", "hidden", "blocks"}
    for kind in kinds:
        kept = random_masks(found.groups, kind)
        with gated(model, found.groups, {n: m.float() for n, m in kept.items()}):
            got = logits(model)
        zeroed = logits(zero(copy.deepcopy(model), kept))
        assert off(zeroed, logits(model)) > 1e-3, kind
        if kind != "experts":
            assert off(got, zeroed) < 1e-5, kind
        if kind in ("neurons", "heads", "blocks", "experts"):
            assert off(got, logits(remove(copy.deepcopy(model), kept))) < 1e-5, kind


def test_many_trials_of_zeros_and_ones_leave_no_trace(llama: nn.Module) -> None:
    """As a search over masks runs them: no copy of the model, the same parameters, trial by
    trial.
    """
    groups, dense = discover(llama), logits(llama)
    pointers = [p.data_ptr() for p in llama.parameters()]
    for seed in range(20):
        kept = random_masks(groups, "neurons", seed) | random_masks(groups, "heads", seed)
        with gated(llama, groups, {n: m.float() for n, m in kept.items()}):
            got = logits(llama)
        assert off(got, dense) > 1e-3
        assert torch.equal(logits(llama), dense)
    assert [p.data_ptr() for p in llama.parameters()] == pointers


def test_zeros_of_single_weights_are_zeros_in_the_matrix(architecture: nn.Module) -> None:
    groups = matrices(architecture)
    masks = {n: (z > 0.3).float() for n, z in random_z(groups, "weights").items()}
    by_hand = copy.deepcopy(architecture)
    zero_elements(by_hand, groups, {n: m.bool() for n, m in masks.items()})
    dense = logits(architecture)
    with gated(architecture, groups, masks):
        got = logits(architecture)
    assert off(got, logits(by_hand)) < 1e-5
    assert torch.equal(logits(architecture), dense)


def test_several_passes_and_several_masks_inside_each_other(llama: nn.Module) -> None:
    groups = discover(llama) + matrices(llama)
    neurons = {n: v.requires_grad_() for n, v in random_z(groups, "neurons").items()}
    weights, others = (random_z(groups, "weights", seed) for seed in (1, 2))
    together = {n: w * others[n] for n, w in weights.items()}
    with gated(llama, groups, {**neurons, **together}):
        expected = logits(llama)
        for _ in range(2):
            llama(input_ids=TOKENS).logits.sum().backward()
    with gated(llama, groups, weights), gated(llama, groups, {**neurons, **others}):
        assert off(logits(llama), expected) < 1e-6
        assert off(logits(llama), expected) < 1e-6


@pytest.fixture
def all_kinds(mixtral: nn.Module) -> Callable[[], dict[str, Tensor]]:
    groups = discover(mixtral) + matrices(mixtral)

    def draw() -> dict[str, Tensor]:
        kinds = ("neurons", "heads", "hidden", "blocks", "experts", "weights")
        return {n: v for kind in kinds for n, v in random_z(groups, kind).items()}

    return draw


def test_everything_comes_off(
    mixtral: nn.Module, all_kinds: Callable[[], dict[str, Tensor]]
) -> None:
    """To the bit; the parameters are the same objects all the time."""
    groups = discover(mixtral) + matrices(mixtral)
    dense, hooks = logits(mixtral), hooks_of(mixtral)
    tensors = {n: (p, p.clone()) for n, p in mixtral.named_parameters()}
    with gated(mixtral, groups, all_kinds()) as model:
        assert model is mixtral
        assert off(logits(mixtral), dense) > 1e-2
        assert all(p is tensors[n][0] for n, p in mixtral.named_parameters())
    assert hooks_of(mixtral) == hooks
    assert torch.equal(logits(mixtral), dense)
    assert all(p is tensors[n][0] for n, p in mixtral.named_parameters())
    assert all(torch.equal(p, tensors[n][1]) for n, p in mixtral.named_parameters())


def test_everything_comes_off_after_an_exception_too(
    mixtral: nn.Module, all_kinds: Callable[[], dict[str, Tensor]]
) -> None:
    """Also after one amid a forward, when parameters stand replaced and the router is followed."""
    groups = discover(mixtral) + matrices(mixtral)
    dense, hooks = logits(mixtral), hooks_of(mixtral)
    parameters = dict(mixtral.named_parameters())
    places = [mixtral.model.layers[0].mlp.experts.act_fn, mixtral.model.layers[1].mlp.gate]
    for place in places:

        def fail(*_: object) -> None:
            raise RuntimeError("amid a forward")

        broken = place.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="amid"), gated(mixtral, groups, all_kinds()):
            logits(mixtral)
        broken.remove()
        assert hooks_of(mixtral) == hooks
        assert all(p is parameters[n] for n, p in mixtral.named_parameters())
        assert torch.equal(logits(mixtral), dense)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        ({"neurons.9": torch.ones(88)}, "no group called 'neurons.9'.*neurons.0"),
        ({"neurons.0": torch.ones(5)}, r"shape \(88,\), got torch.float32 \(5,\)"),
        ({"neurons.0": torch.ones(88, dtype=torch.bool)}, "floating-point"),
    ],
)
def test_a_wrong_z_is_refused_with_what_is_possible(
    llama: nn.Module, z: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ConfigError, match=message), gated(llama, discover(llama), z):
        pass
    assert not any(hooks_of(llama))


def test_a_group_of_another_model_is_refused(llama: nn.Module, mixtral: nn.Module) -> None:
    groups = discover(mixtral)
    with (
        pytest.raises(ConfigError, match="no group neurons.0 of 40 units.*neurons.0 .88."),
        gated(llama, groups, random_z(groups, "neurons")),
    ):
        pass
    assert not any(hooks_of(llama))
