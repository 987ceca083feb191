"""A pruned model that is written loads again to the bit, with and without prunekit, and a folder is
complete or not there.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from checkpoints import llama, narrow, uneven
from torch import nn
from transformers import (
    AutoConfig,
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from prunekit import graph
from prunekit.checkpoint import load, save
from prunekit.checkpoint.remote_code.runtime_modules import Bypass
from prunekit.checkpoint.stock_config import stock_config
from prunekit.errors import ConfigError
from prunekit.types import Group, Member


def same(a: nn.Module, b: nn.Module, tokens: torch.Tensor) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)
    with torch.no_grad():
        assert torch.equal(a(tokens).logits, b(tokens).logits)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(
    tmp_path: Path, tokens: torch.Tensor, tie: bool, dtype: torch.dtype
) -> None:
    model = uneven(llama(tie)).to(dtype)
    save(model, None, tmp_path / "out")
    again, tokenizer = load(tmp_path / "out")
    assert tokenizer is None
    assert not again.training
    same(model, again, tokens)
    if tie:
        assert again.lm_head.weight is again.get_input_embeddings().weight
    out = [
        again.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*out)
    assert torch.equal(out[0], model.generate(tokens, max_new_tokens=8, do_sample=False))


def test_dense_model_needs_no_code_of_ours(tmp_path: Path) -> None:
    save(llama(), None, tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))


def test_manifest_tells_what_was_kept(tmp_path: Path) -> None:
    mask = torch.ones(64, dtype=torch.bool)
    mask[[3, 5]] = False
    group = Group(
        "neurons.0",
        "neurons",
        0,
        64,
        (Member("model.layers.0.mlp.gate_proj.weight", 0, torch.arange(64)[:, None]),),
    )
    save(
        llama(),
        None,
        tmp_path / "out",
        kept={"neurons.0": mask},
        groups=[group],
        config={"seed": 1},
        counts={"params": 5},
    )
    manifest = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert manifest["groups"]["neurons.0"]["kept"] == [i for i in range(64) if i not in (3, 5)]
    assert manifest["config"] == {"seed": 1}
    assert manifest["counts"] == {"params": 5}


def test_a_model_in_shards_comes_back(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = uneven(llama())
    save(model, None, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    same(model, load(tmp_path / "out")[0], tokens)


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_zeros_packed_as_a_bitmask(tmp_path: Path, tokens: torch.Tensor, shard: str) -> None:
    model = llama(tie=True)
    for p in model.model.layers.parameters():
        if p.dim() == 2:
            p.data.masked_fill_(
                torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.7, 0
            )
    plain, packed = save(model, None, tmp_path / "plain", max_shard_size=shard), tmp_path / "packed"
    save(model, None, packed, packed=True, max_shard_size=shard)
    same(model, load(packed)[0], tokens)
    assert json.loads((packed / "pruning.json").read_text())["loads_with"] == "prunekit.load"
    bytes_of = {f: sum(x.stat().st_size for x in f.glob("*.safetensors")) for f in (plain, packed)}
    assert bytes_of[packed] < 0.55 * bytes_of[plain]
    with pytest.raises(
        OSError, match="no file named|No such file"
    ):  # never random weights in silence
        LlamaForCausalLM.from_pretrained(packed)


def test_a_loaded_model_can_be_saved_again(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = uneven(llama())
    save(model, None, tmp_path / "one")
    once = load(tmp_path / "one")[0]
    save(once, None, tmp_path / "two")
    same(model, load(tmp_path / "two")[0], tokens)


def test_an_added_bias_and_a_number_of_one_module_come_back(
    tmp_path: Path, tokens: torch.Tensor
) -> None:
    model = uneven(llama())
    model.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.randn(48))
    model.model.layers[1].input_layernorm.variance_epsilon = 0.125
    save(model, None, tmp_path / "out")
    same(model, load(tmp_path / "out")[0], tokens)


def test_a_changed_buffer_comes_back(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = llama()
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.37
    save(model, None, tmp_path / "out")
    again = load(tmp_path / "out")[0]
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    same(model, again, tokens)


def test_skipped_sublayers_travel(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = llama()
    model.model.layers[1].self_attn = Bypass(outputs=2)
    model.model.layers[2].mlp = Bypass()
    save(model, None, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["per_layer_config"]
    assert told == {"1": {"skip": ["self_attn"]}, "2": {"skip": ["mlp"]}}
    again = load(tmp_path / "out")[0]
    same(model, again, tokens)
    save(again, None, tmp_path / "twice")
    same(model, load(tmp_path / "twice")[0], tokens)
    out = [
        again.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*out)


def test_what_differs_by_layer_stands_in_per_layer_config(tmp_path: Path) -> None:
    model = uneven(llama())
    save(model, None, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert [layer.intermediate_size for layer in config.per_layer_config] == [55, 46, 37]
    assert [layer.num_key_value_heads for layer in config.per_layer_config] == [3, 2, 3]
    assert [layer.num_attention_heads for layer in config.per_layer_config] == [6, 4, 6]


def test_sizes_that_the_class_refuses(tmp_path: Path, tokens: torch.Tensor) -> None:
    """48 channels, of which 47 stay, are no multiple of 6 heads: the config says the next size that
    is, the layout the true one.
    """
    model = llama()
    graph.remove(model, {"hidden": torch.arange(48) != 5})
    save(model, None, tmp_path / "out")
    same(model, load(tmp_path / "out")[0], tokens)
    assert AutoConfig.from_pretrained(tmp_path / "out").hidden_size == 48


def test_positions_computed_outside_travel(tmp_path: Path, tokens: torch.Tensor) -> None:
    """BLOOM's ALiBi slopes enter each layer as an argument, of which a layer with fewer heads must
    see a part.
    """
    torch.manual_seed(0)
    model = BloomForCausalLM(
        BloomConfig(vocab_size=100, hidden_size=48, n_layer=2, n_head=6, pad_token_id=0)
    ).eval()
    graph.remove(model, {"heads.0": torch.arange(6) != 2, "heads.1": torch.arange(6) > 2})
    save(model, None, tmp_path / "one")
    once = load(tmp_path / "one")[0]
    same(model, once, tokens)
    save(once, None, tmp_path / "two")
    same(model, load(tmp_path / "two")[0], tokens)


def test_a_copy_of_a_pruned_model_is_saved_like_the_model(
    tmp_path: Path, tokens: torch.Tensor
) -> None:
    """Also where removal left hooks: what they do is known of the copy too."""
    torch.manual_seed(0)
    model = BloomForCausalLM(
        BloomConfig(vocab_size=100, hidden_size=48, n_layer=2, n_head=6, pad_token_id=0)
    ).eval()
    graph.remove(model, {"heads.0": torch.arange(6) != 2, "heads.1": torch.arange(6) > 2})
    save(copy.deepcopy(model), None, tmp_path / "out")
    same(model, load(tmp_path / "out")[0], tokens)


def test_expert_widths_that_no_grouped_kernel_takes(tmp_path: Path, tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 2,
    }
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_local_experts=4, vocab_size=100, pad_token_id=0)
    ).eval()
    graph.remove(
        model,
        {g.name: torch.arange(g.units) > 1 for g in graph.discover(model) if g.kind == "neurons"},
    )
    widths = {
        e.down_proj.shape[-1] * 4 % 16 for e in (layer.mlp.experts for layer in model.model.layers)
    }
    save(model, None, tmp_path / "one")
    once = load(tmp_path / "one")[0]
    same(model, once, tokens)
    save(once, None, tmp_path / "two")
    same(model, load(tmp_path / "two")[0], tokens)
    assert widths == {8}
    assert (
        json.loads((tmp_path / "two" / "config.json").read_text())["experts_implementation"]
        == "eager"
    )


def test_stock_where_the_class_can_build_it(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = llama()
    kept = {
        g.name: torch.arange(g.units) % 3 != 0
        for g in graph.discover(model)
        if g.kind in ("neurons", "heads")
    }
    graph.remove(model, kept)
    assert stock_config(model).num_key_value_heads == 2
    save(model, None, tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").glob("*.py")) == []
    same(model, LlamaForCausalLM.from_pretrained(tmp_path / "out"), tokens)


@pytest.mark.slow
def test_the_real_model_comes_back_and_generates_the_same(smollm2, tmp_path: Path) -> None:
    """Half of a trained model, uneven: the same numbers to the bit, the same text with and without
    cache.
    """
    model, tokenizer = smollm2
    model = copy.deepcopy(model)
    groups = graph.discover(model)
    kept = {
        g.name: torch.arange(g.units) % (3 + g.layer % 3) != 0
        for g in groups
        if g.kind == "neurons"
    }
    graph.remove(model, kept)
    save(model, tokenizer, tmp_path / "out", kept=kept, groups=groups)
    again, words = load(tmp_path / "out")
    asked = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert words("The capital of France is").input_ids == asked[0].tolist()
    same(model, again, asked)
    out = [
        again.generate(asked, max_new_tokens=16, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*out)


def test_what_no_config_tells_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[0].mlp.act_fn = nn.GELU()
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.act_fn"):
        save(model, None, tmp_path / "out")
    model = llama()
    model.model.norm.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ConfigError, match="logits"):
        save(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="Linear"):
        save(nn.Linear(2, 2), None, tmp_path / "out")


def test_a_model_that_cannot_run_says_so(tmp_path: Path) -> None:
    model = llama()
    narrow(model.model.layers[0].mlp.up_proj, 0, torch.arange(50))
    with pytest.raises(ConfigError, match="the model cannot run"):
        save(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())
