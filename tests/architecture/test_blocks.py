"""The decoder blocks and their linear modules: every part of prunekit finds the same ones."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from prunekit import graph
from prunekit.architecture.blocks import (
    block_modules,
    block_names,
    check_unbroken,
    linear_names,
)
from prunekit.architecture.matrices import matrices, module_name
from prunekit.errors import ConfigError

BLOCKS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "mixtral": "model.layers",
}
MLP = {
    "llama": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "gpt2": ["mlp.c_fc", "mlp.c_proj"],
    "opt": ["fc1", "fc2"],
    "bloom": ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    "mixtral": [],  # its experts are stacked in tensors of three axes
}


@pytest.mark.parametrize("arch", BLOCKS)
def test_everybody_finds_the_same_blocks_and_linear_modules(arch):
    model = tiny_model(arch)
    names = block_names(model)
    assert names == tuple(f"{BLOCKS[arch]}.{i}" for i in range(2))
    assert [model.get_submodule(n) for n in names] == block_modules(model)
    (found,) = [g.modules for g in graph.discover(model, verify=False) if g.kind == "blocks"]
    assert found == names
    groups = matrices(model)
    assert tuple(module_name(g) for g in groups) == linear_names(model)
    assert [g.layer for g in groups] == [
        i for i, n in enumerate(names) for m in linear_names(model) if m.startswith(n + ".")
    ]


@pytest.mark.parametrize("arch", BLOCKS)
def test_a_target_is_a_pattern_for_the_name_in_the_block_or_its_last_part(arch):
    model = tiny_model(arch)
    wanted = tuple(f"{BLOCKS[arch]}.{i}.{n}" for i in range(2) for n in MLP[arch])
    for targets in (MLP[arch], [n.rpartition(".")[2] for n in MLP[arch]]) if wanted else ():
        if arch != "gpt2" or "mlp.c_proj" in targets:  # its attention has a c_proj, too
            assert linear_names(model, targets) == wanted
    if arch not in ("opt", "mixtral"):
        assert linear_names(model, ["mlp.*"]) == wanted
    assert set(linear_names(model, ["*"])) == set(linear_names(model))
    with pytest.raises(ConfigError, match=r"targets=\['model.layers.0.mlp'\] match no linear"):
        linear_names(model, ["model.layers.0.mlp"])
    with pytest.raises(ConfigError, match=r"targets=\['wheels'\] match no linear"):
        linear_names(model, ["*", "wheels"])


def test_patterns_reach_the_last_part_too():
    found = linear_names(tiny_model("llama"), ["[kv]_proj"])
    assert [n.rpartition(".")[2] for n in found] == ["k_proj", "v_proj"] * 2


def test_the_outer_list_wins_over_lists_inside_the_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    class Model(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.embed = nn.Embedding(1000, 4)
            self.blocks = nn.ModuleList(Block() for _ in range(depth))

    for depth in (1, 2):  # of one block, its list of experts holds as much as the list of blocks
        assert block_names(Model(depth)) == tuple(f"blocks.{i}" for i in range(depth))
    assert linear_names(Model(1), ["experts.[01]"]) == ("blocks.0.experts.0", "blocks.0.experts.1")


def test_a_block_that_is_itself_linear_and_an_empty_one():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = nn.Parameter(torch.empty(0, 3))
    assert block_names(model) == ("0", "1")
    assert linear_names(model) == ("0",)


def test_a_model_without_a_list_is_refused():
    with pytest.raises(ConfigError, match=r"Linear has no nn\.ModuleList"):
        block_names(nn.Linear(2, 2))


@pytest.mark.parametrize("blocks", [("a.h.0", "a.h.2"), ("a.h.0", "b.h.1"), ("a.h.1", "a.h.0")])
def test_blocks_with_a_gap_of_two_lists_or_out_of_order_are_no_run(blocks):
    with pytest.raises(ConfigError, match="takes one unbroken run of blocks"):
        check_unbroken(blocks, "it takes")


@pytest.mark.parametrize("blocks", [("a.h.3", "a.h.4"), ("9", "10"), ("a.0",)])
def test_a_run_of_blocks_is_one(blocks):
    check_unbroken(blocks, "it takes")
