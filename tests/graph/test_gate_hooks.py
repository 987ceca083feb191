"""What a gate between 0 and 1 multiplies, by hand, kind by kind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from gates import logits, off, random_z
from torch import Tensor, nn

from prunekit.graph import discover, gated
from prunekit.graph.gate_hooks import NormGate, NormStyle, Scale, norm_style
from prunekit.graph.small_model import randomised


def test_a_neurons_activation_is_multiplied_by_z(llama: nn.Module, mixtral: nn.Module) -> None:
    groups = discover(llama)
    z = random_z(groups, "neurons")
    by_hand = copy.deepcopy(llama)
    for i, layer in enumerate(by_hand.model.layers):
        layer.mlp.down_proj.weight.data *= z[f"neurons.{i}"]
    with gated(llama, groups, z):
        assert off(logits(llama), logits(by_hand)) < 1e-6
    z = random_z(discover(mixtral), "neurons")
    by_hand = copy.deepcopy(mixtral)
    for i, layer in enumerate(by_hand.model.layers):
        layer.mlp.experts.down_proj.data *= z[f"neurons.{i}"]
    with gated(mixtral, discover(mixtral), z):
        assert off(logits(mixtral), logits(by_hand)) < 1e-6


def test_what_is_written_into_the_stream_is_multiplied_by_z(mixtral: nn.Module) -> None:
    """Once, also where experts' matrices are stacked: those that read the stream stay as
    they are.
    """
    z = random_z(discover(mixtral), "hidden")
    by_hand = copy.deepcopy(mixtral)
    by_hand.model.embed_tokens.weight.data *= z["hidden"]
    for layer in by_hand.model.layers:
        layer.self_attn.o_proj.weight.data *= z["hidden"][:, None]
        layer.mlp.experts.down_proj.data *= z["hidden"][:, None]
    with gated(mixtral, discover(mixtral), z):
        assert off(logits(mixtral), logits(by_hand)) < 1e-6


def test_tied_embeddings_are_multiplied_where_they_write_only(llama: nn.Module) -> None:
    z = random_z(discover(llama), "hidden")
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    by_hand = copy.deepcopy(llama)
    by_hand.model.embed_tokens.weight = nn.Parameter(llama.lm_head.weight * z["hidden"])
    for layer in by_hand.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.data *= z["hidden"][:, None]
    with gated(llama, discover(llama), z):
        assert off(logits(llama), logits(by_hand)) < 1e-6


class OneMore(nn.LayerNorm):
    """As in Nemotron, the weight is the gain less one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


@pytest.mark.parametrize(("kind", "offset"), [(nn.LayerNorm, 0.0), (OneMore, 1.0)])
def test_of_a_layer_norm_only_what_is_not_the_channels_own_is_multiplied(
    kind: type[nn.LayerNorm], offset: float
) -> None:
    norm = randomised(kind(10, eps=1e-3))
    assert norm_style(norm, 10) == NormStyle(True, offset, 1e-3)
    x, z = torch.randn(3, 10), torch.rand(10)
    rate = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-3)
    gain = norm.weight + offset
    expected = gain * x * rate + z * (norm.bias - gain * x.mean(-1, keepdim=True) * rate)
    scale = Scale.over(10, torch.arange(10)[:, None], z)
    norm.register_forward_hook(NormGate(scale, NormStyle(True, offset, 1e-3)))
    assert torch.allclose(norm(x), expected, atol=1e-6)


def test_an_rms_norm_is_recognised_by_zeros_that_stay_zero() -> None:
    assert norm_style(randomised(nn.RMSNorm(10)), 10) == NormStyle(False)
    assert norm_style(nn.Sequential(nn.Linear(10, 10), nn.LayerNorm(10)), 10) is None


def test_a_block_is_mixed_with_its_input(llama: nn.Module) -> None:
    z = torch.tensor([1.0, 0.25, 1.0])
    seen: dict[str, Tensor] = {}
    with gated(llama, discover(llama), {"blocks": z}):
        handle = llama.model.layers[2].register_forward_pre_hook(
            lambda module, args: seen.update(after=args[0])
        )
        logits(llama)
        handle.remove()
    grab = llama.model.layers[1].register_forward_hook(
        lambda module, args, output: seen.update(given=args[0], made=output)
    )
    logits(llama)
    grab.remove()
    expected = seen["given"] + 0.25 * (seen["made"] - seen["given"])
    assert torch.allclose(seen["after"], expected, atol=1e-5)


def test_of_an_expert_the_contribution_is_multiplied_and_the_routing_stays(
    mixtral: nn.Module,
) -> None:
    groups = discover(mixtral)
    z = {n: 0.1 + v for n, v in random_z(groups, "experts").items()}
    by_hand = copy.deepcopy(mixtral)
    for i, layer in enumerate(by_hand.model.layers):

        def weigh(
            module: nn.Module, args: object, output: tuple[Tensor, ...], i: int = i
        ) -> object:
            raw, scores, chosen = output
            return raw, scores * z[f"experts.{i}"][chosen], chosen

        layer.mlp.gate.register_forward_hook(weigh)
    with gated(mixtral, groups, z):
        assert off(logits(mixtral), logits(by_hand)) < 1e-5


def test_parts_of_a_split_group_are_multiplied_one_by_one(llama: nn.Module) -> None:
    from prunekit.pruners.oneshot import split

    parts, _ = split([g for g in discover(llama) if g.name == "neurons.1"], {"neurons.1": 3})
    z = {g.name: torch.rand(g.units) for g in parts}
    by_hand = copy.deepcopy(llama)
    mlp = by_hand.model.layers[1].mlp
    for g, w in zip(parts, (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T)):
        w.data *= z[g.name][:, None]
    with gated(llama, parts, z):
        assert off(logits(llama), logits(by_hand)) < 1e-6
