"""What discovery finds on Llama, written out by hand, and on skeletons of models that are too large
to hold.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prunekit.errors import ConfigError
from prunekit.graph import discover, edits, remove, report
from prunekit.graph.expert_neurons import module_around
from prunekit.types import Group, Member


def by_name(groups: list[Group]) -> dict[str, Group]:
    return {g.name: g for g in groups}


def test_llama_groups_are_those_written_by_hand(llama: nn.Module) -> None:
    groups = by_name(discover(llama))
    locals_ = [f"{kind}.{i}" for i in range(3) for kind in ("heads", "neurons")]
    assert set(groups) == {"hidden", "blocks", *locals_}
    assert report(llama) == []
    for i in range(3):
        layer = f"model.layers.{i}"
        mlp, heads = groups[f"neurons.{i}"], groups[f"heads.{i}"]
        assert (mlp.kind, mlp.layer, mlp.units, heads.kind, heads.layer, heads.units) == (
            "neurons",
            i,
            88,
            "heads",
            i,
            3,
        )
        assert [(m.param, m.axis) for m in mlp.members] == [
            (f"{layer}.mlp.gate_proj.weight", 0),
            (f"{layer}.mlp.up_proj.weight", 0),
            (f"{layer}.mlp.down_proj.weight", 1),
        ]
        assert all(torch.equal(m.index, torch.arange(88)[:, None]) for m in mlp.members)
        assert [(m.param, m.axis) for m in heads.members] == [
            *((f"{layer}.self_attn.{p}_proj.weight", 0) for p in "qkv"),
            (f"{layer}.self_attn.o_proj.weight", 1),
        ]
        for m, width in zip(heads.members, (16, 8, 8, 16), strict=True):
            assert torch.equal(m.index, torch.arange(3 * width).reshape(3, width))
    per_layer = [
        ("input_layernorm", 0),
        *((f"self_attn.{p}_proj", 1) for p in "qkv"),
        ("self_attn.o_proj", 0),
    ]
    per_layer += [
        ("post_attention_layernorm", 0),
        ("mlp.gate_proj", 1),
        ("mlp.up_proj", 1),
        ("mlp.down_proj", 0),
    ]
    expected = [("model.embed_tokens.weight", 1)]
    expected += [
        (f"model.layers.{i}.{n}.weight", axis) for i in range(3) for n, axis in per_layer
    ] + [("model.norm.weight", 0)]
    hidden = groups["hidden"]
    assert (hidden.units, hidden.layer) == (48, None)
    assert sorted((m.param, m.axis) for m in hidden.members) == sorted(expected)
    assert hidden.members[0].param == "model.embed_tokens.weight"
    assert hidden.members[-1].param == "model.norm.weight"
    assert groups["blocks"].modules == tuple(f"model.layers.{i}" for i in range(3))


def seven_b() -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_hidden_layers=32,
        vocab_size=32000,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float16)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_llama_7b_without_weights_falls_to_the_papers_counts() -> None:
    """llm_pruner.md section 2: Block 20 % (units 0.25 in blocks 4..29), Block 50 % (0.60 in 3..30),
    Channel 20 % and 50 %.
    """
    for share, first, last, expected in (
        (0.25, 4, 30, 5_422_977_024),
        (0.60, 3, 31, 3_350_188_032),
    ):
        model = seven_b()
        heads, neurons = (
            torch.arange(32) >= 32 - -int(-32 * (1 - share) // 1),
            torch.arange(11008) >= 11008 - int(11008 * (1 - share)),
        )
        kept = {
            f"{kind}.{i}": mask
            for i in range(first, last)
            for kind, mask in (("heads", heads), ("neurons", neurons))
        }
        remove(model, kept)
        assert count(model) == expected
        assert all(p.is_meta for p in model.parameters())
        assert (
            model.config.num_attention_heads == 32
        )  # widths differ by layer: the shared config cannot say them
        assert edits(model)["attributes"]["model.layers.5.mlp"]["intermediate_size"] == int(
            neurons.sum()
        )
    for kept_channels, expected in ((3276, 5_389_416_396), (2048, 3_369_207_808)):
        model = remove(seven_b(), {"hidden": torch.arange(4096) < kept_channels}, norm="rescale")
        assert count(model) == expected
        assert (model.config.hidden_size, model.config.head_dim) == (kept_channels, 128)


def test_uniform_removal_is_followed_by_the_config(llama: nn.Module) -> None:
    model = copy.deepcopy(llama)
    heads, neurons = torch.tensor([True, False, True]), torch.arange(88) < 80
    remove(
        model,
        {f"{k}.{i}": m for i in range(3) for k, m in (("heads", heads), ("neurons", neurons))},
    )
    c = model.config
    assert (
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
        c.intermediate_size,
        c.hidden_size,
    ) == (4, 2, 8, 80, 48)
    remove(model, {"blocks": torch.tensor([True, False, True])})
    assert (
        c.num_hidden_layers,
        len(model.model.layers),
        model.model.layers[1].self_attn.layer_idx,
    ) == (2, 2, 1)


def test_parts_slice_each_member_by_its_own_mask(llama: nn.Module) -> None:
    group = by_name(discover(llama))["neurons.1"]
    kept = {}
    for n, part in enumerate(group.parts):
        kept[part.name] = mask = torch.ones(88, dtype=torch.bool)
        mask[n * 7 : n * 7 + 5] = False
    model = remove(copy.deepcopy(llama), kept)
    for part, m in zip(group.parts, group.members):
        expected = llama.get_parameter(m.param).index_select(
            m.axis, kept[part.name].nonzero()[:, 0]
        )
        assert torch.equal(model.get_parameter(m.param), expected)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"neurons.9": torch.ones(88, dtype=torch.bool)}, "neurons.0"),
        ({"neurons.0": torch.ones(5, dtype=torch.bool)}, r"\(88,\)"),
        ({"neurons.0": torch.ones(88)}, "bool"),
        ({"heads.0": torch.zeros(3, dtype=torch.bool)}, "at least 1"),
        (
            {"neurons.0/model.layers.0.mlp.gate_proj.weight:0": torch.ones(88, dtype=torch.bool)},
            "missing",
        ),
        (
            {"neurons.0/model.layers.0.mlp.gate_proj.weight:1": torch.ones(88, dtype=torch.bool)},
            "no group called",
        ),
    ],
)
def test_wrong_masks_are_refused_with_what_is_possible(
    llama: nn.Module, kept: dict[str, torch.Tensor], message: str
) -> None:
    before = {n: p.shape for n, p in llama.named_parameters()}
    with pytest.raises(ConfigError, match=message):
        remove(llama, kept)
    assert {n: p.shape for n, p in llama.named_parameters()} == before


def test_rescale_is_refused_where_a_norm_has_no_such_correction(architecture: nn.Module) -> None:
    if not any(isinstance(m, nn.LayerNorm) for m in architecture.modules()):
        pytest.skip("has RMSNorms only: those are tested by the property")
    units = by_name(discover(architecture))["hidden"].units
    with pytest.raises(ConfigError, match="LayerNorm"):
        remove(architecture, {"hidden": torch.arange(units) < units - 4}, norm="rescale")


def test_the_module_around_experts_ends_where_their_names_part() -> None:
    unit = torch.arange(4)[:, None]
    names = ("block.moe.router.layer.weight", "block.moe.experts.layer.w1")
    members = tuple(Member(name, 0, unit) for name in names)
    assert module_around(Group("experts.0", "experts", 0, 4, members)) == "block.moe"
