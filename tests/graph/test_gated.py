"""`gated`: units multiplied by z while the model runs, with gradients to z, and nothing left of it
afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.architecture.matrices import matrices
from prunekit.errors import ConfigError
from prunekit.graph import discover, gated, zero
from prunekit.graph.discovery import discovery
from prunekit.graph.gate_hooks import NormGate, NormStyle, Scale, norm_style
from prunekit.graph.small_model import randomised
from prunekit.graph.verification import masked_logits
from prunekit.types import Group

TOKENS = torch.randint(8, 100, (2, 12), generator=torch.Generator().manual_seed(1))
ROUTED = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
OTHERS = {
    "mixtral": ("MixtralConfig", {**ROUTED, "num_local_experts": 5}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **ROUTED,
            "num_key_value_heads": 4,
            "n_routed_experts": 6,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "q_lora_rank": 20,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 10,
            "first_k_dense_replace": 1,
        },
    ),
    "olmo": (
        "OlmoConfig",
        {k: v for k, v in ROUTED.items() if k != "num_experts_per_tok"},
    ),
}
"""Experts; experts with a bias for choosing, and ranks with a norm over them; LayerNorms without
parameters.
"""


@pytest.fixture(scope="session", params=OTHERS)
def other(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


@pytest.fixture(scope="session")
def mixtral() -> nn.Module:
    return build("mixtral")


def build(name: str) -> nn.Module:
    import transformers

    config, sizes = OTHERS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**sizes)
    ).eval()
    model.config.use_cache = False
    model = randomised(model)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer += torch.linspace(0, 2, len(buffer))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def random_masks(groups: list[Group], kind: str, seed: int = 0) -> dict[str, Tensor]:
    """A third of the units of every group of a kind lost, one at least."""
    draw, kept = torch.Generator().manual_seed(seed), {}
    for g in groups:
        if g.kind == kind:
            kept[g.name] = torch.ones(g.units, dtype=torch.bool)
            lost = torch.randperm(g.units, generator=draw)[: max(1, g.units // 3)]
            kept[g.name][lost] = False
    return kept


def random_z(groups: list[Group], kind: str, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.shape, generator=draw) for g in groups if g.kind == kind}


def hooks_of(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("kind", ["neurons", "heads", "hidden", "blocks"])
def test_zeros_and_ones_equal_zeroing(architecture: nn.Module, kind: str) -> None:
    groups = discover(architecture)
    kept = random_masks(groups, kind)
    dense = logits(architecture)
    with gated(architecture, groups, {n: m.float() for n, m in kept.items()}):
        got = logits(architecture)
    zeroed = logits(zero(copy.deepcopy(architecture), kept))
    assert off(zeroed, dense) > 1e-2
    assert off(got, zeroed) < 1e-5
    assert torch.equal(logits(architecture), dense)
    with gated(architecture, groups, {n: torch.ones(len(m)) for n, m in kept.items()}):
        assert torch.equal(logits(architecture), dense)


def test_zeros_and_ones_equal_zeroing_where_units_pass_norms_and_routers(other: nn.Module) -> None:
    """Experts equal their removal: the statistics of their router run over those that stay."""
    found = discovery(other)
    kinds = {g.kind for g in found.groups}
    assert kinds >= {"neurons", "heads", "hidden", "blocks"}
    for kind in kinds:
        kept = random_masks(found.groups, kind)
        with gated(other, found.groups, {n: m.float() for n, m in kept.items()}):
            got = logits(other)
        if kind == "experts":
            asked = [
                (c, {(m.param, m.axis): kept[c.group.name] for m in c.group.members})
                for c in found.candidates
                if c.group.name in kept
            ]
            reference = masked_logits(other, {"input_ids": TOKENS}, asked, found.skip)
        else:
            reference = logits(zero(copy.deepcopy(other), kept))
        assert off(reference, logits(other)) > 1e-3, kind
        assert off(got, reference) < 1e-5, kind


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


def test_an_rms_norm_is_told_by_zeros_that_stay_zero() -> None:
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


def test_elements_of_a_matrix_with_gradients_to_z_and_to_the_weight(
    architecture: nn.Module,
) -> None:
    groups = matrices(architecture)
    z = {n: v.requires_grad_() for n, v in random_z(groups, "weights").items()}
    by_hand = copy.deepcopy(architecture).requires_grad_(True)
    weights = {g.name: by_hand.get_parameter(g.members[0].param) for g in groups}
    with torch.no_grad():
        for name, weight in weights.items():
            weight *= z[name]
    by_hand(input_ids=TOKENS).logits.square().mean().backward()
    architecture.requires_grad_(True)
    with gated(architecture, groups, z):
        architecture(input_ids=TOKENS).logits.square().mean().backward()
    for g in groups:
        weight, grad = architecture.get_parameter(g.members[0].param), weights[g.name].grad
        assert torch.allclose(weight.grad, grad * z[g.name], atol=1e-5)
        assert torch.allclose(z[g.name].grad, grad * weight, atol=1e-5)
    architecture.requires_grad_(False)
    architecture.zero_grad()


def test_gradients_equal_finite_differences(llama: nn.Module) -> None:
    check_gradients(copy.deepcopy(llama).double(), ["neurons", "heads", "hidden", "blocks"])


def test_gradients_of_experts_equal_finite_differences(mixtral: nn.Module) -> None:
    model = copy.deepcopy(mixtral).double()
    model.config._experts_implementation = "eager"  # grouped products take no doubles
    check_gradients(model, ["experts", "neurons", "hidden"])


def check_gradients(model: nn.Module, kinds: list[str]) -> None:
    """The norms of these models compute in float32, whatever the model's type: hence the step."""
    groups = discover(model)
    z = {n: v.double() for kind in kinds for n, v in random_z(groups, kind).items()}

    def loss(z: dict[str, Tensor]) -> Tensor:
        with gated(model, groups, z):
            return model(input_ids=TOKENS).logits.square().mean()

    leaves = {n: v.clone().requires_grad_() for n, v in z.items()}
    loss(leaves).backward()
    draw = torch.Generator().manual_seed(3)
    towards = {n: v.grad.sign() * torch.rand(v.shape, generator=draw) for n, v in leaves.items()}
    for kind in kinds:
        names = [n for n in z if n.split(".")[0] == kind]
        slope = sum(float((leaves[n].grad * towards[n]).sum()) for n in names)
        ends = [
            float(loss({**z, **{n: z[n] + step * towards[n] for n in names}}))
            for step in (1e-3, -1e-3)
        ]
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-2)


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
