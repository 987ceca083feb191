"""Zeros that must stay: found where units were set to zero, not where they were cut out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prunekit import graph
from prunekit.graph.masks import zero_block
from prunekit.graph.zero_masks import zero_masks
from prunekit.types import Group, Kept

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
OPT = {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
MIXTRAL = {"intermediate_size": 24, "num_key_value_heads": 1, "num_local_experts": 4}
ARCHS = {
    "llama": {"intermediate_size": 24, "num_key_value_heads": 1},
    "opt": OPT,  # its biases start at zero
    "mixtral": MIXTRAL,
    "phi3": {"intermediate_size": 24, "num_key_value_heads": 1, "pad_token_id": 0},  # fused
}


def tiny(arch: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(arch, **SIZES, **ARCHS[arch])
    return AutoModelForCausalLM.from_config(config).eval()


def half(groups: list[Group]) -> Kept:
    return {g.name: torch.arange(g.units) % 2 == 0 for g in groups}


CASES = [
    (arch, kind)
    for arch in ARCHS
    for kind in ("neurons", "heads", "hidden", "blocks", "experts")
    if (kind == "experts") <= (arch == "mixtral")
]


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_masks_are_the_elements_that_zeroing_set_to_zero(arch, kind):
    model = tiny(arch)
    with torch.no_grad():  # so that a zero is one of pruning
        for p in model.parameters():
            p.copy_(torch.rand_like(p) + 0.1)
    groups = [g for g in graph.discover(model, verify=False) if g.kind == kind]
    kept = half(groups)
    assert zero_masks(model, groups, kept) == {}, "nothing has been pruned yet"
    graph.zero(model, kept)
    masks = zero_masks(model, groups, kept)
    assert masks, "something is zero"
    for name, parameter in model.named_parameters():
        want = parameter != 0
        assert torch.equal(masks.get(name, torch.ones_like(want)), want), name


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_what_was_cut_out_gives_no_mask(arch, kind):
    model = tiny(arch)
    groups = [g for g in graph.discover(model, verify=False) if g.kind == kind]
    kept = half(groups)
    graph.remove(model, kept)
    assert zero_masks(model, groups, kept) == {}


def test_groups_of_blocks_that_bear_other_numbers_now_give_no_mask():
    model = tiny("opt")
    groups = graph.discover(model, verify=False)
    kept = half([g for g in groups if g.kind == "blocks"])
    graph.remove(model, kept)  # the last block is number 1 now
    kept |= half([g for g in groups if g.name in ("neurons.1", "neurons.2")])
    assert zero_masks(model, groups, kept) == {}


def test_single_weights_and_units_of_one_matrix_add_up():
    model = tiny("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    (neurons,) = [g for g in graph.discover(model, verify=False) if g.name == "neurons.0"]
    elements = torch.rand(24, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    matrix = Group("weights.0.up", "weights", 0, 24 * 16, shape=(24, 16), matrix=name)
    kept = half([neurons])
    graph.zero(model, kept)
    kept["weights.0.up"] = elements
    masks = zero_masks(model, [neurons, matrix], kept)
    rows = kept["neurons.0"][:, None]
    assert torch.equal(masks[name], elements & rows)
    # A matrix that has lost rows since then no longer has the elements of the mask.
    small = copy.deepcopy(tiny("llama"))
    graph.remove(small, half([neurons]))
    assert zero_masks(small, [matrix], {"weights.0.up": elements}) == {}


def test_masks_that_keep_all_and_groups_left_out_give_none():
    model = tiny("llama")
    groups = graph.discover(model, verify=False)
    assert zero_masks(model, groups, {}) == {}
    everything = {g.name: torch.ones(g.shape, dtype=torch.bool) for g in groups}
    assert zero_masks(model, groups, everything) == {}


def test_what_live_blocks_share_stays_free():
    model = tiny("llama")
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    groups = [g for g in graph.discover(model, verify=False) if g.kind == "blocks"]
    zero_block(model, "model.layers.1")
    masks = zero_masks(model, groups, {"blocks": torch.tensor([True, False, True])})
    zeroed = {n for n, _ in model.model.layers[1].named_parameters("model.layers.1")}
    assert set(masks) == zeroed - {"model.layers.1.input_layernorm.weight"}
    assert not any(mask.any() for mask in masks.values())
