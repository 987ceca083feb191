"""A model that accelerate keeps in host memory or on disk is written as it is, one shard at a time,
and loads to the bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import llama, uneven
from tiny_models import logits
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from prunekit.architecture import offload
from prunekit.checkpoint import load, save
from prunekit.checkpoint.headers import read_header
from prunekit.checkpoint.remote_code.runtime_modules import Gather, LowRank, insert
from prunekit.checkpoint.remote_code.stream_modules import Rotation
from prunekit.errors import ConfigError

DEVICES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"} | {
    name: "disk" for name in ("model.layers.2", "model.norm", "model.rotary_emb", "lm_head")
}


def on_cpu(model: nn.Module, folder: Path) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


def on_cpu_with_buffers(model: nn.Module, folder: Path) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


def on_disk(model: nn.Module, folder: Path) -> None:
    from accelerate import disk_offload

    disk_offload(model, folder / "offload", execution_device=torch.device("cpu"))


def over_both(model: nn.Module, folder: Path) -> None:
    from accelerate import dispatch_model

    dispatch_model(model, DEVICES, main_device="cpu", offload_dir=folder / "offload")


def block_by_block(model: nn.Module, folder: Path) -> None:
    """One hook for all the weights of a block."""
    from accelerate import cpu_offload

    blocks = ["LlamaDecoderLayer"]
    cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=blocks)


def hooks_only(model: nn.Module, folder: Path) -> None:
    from accelerate import dispatch_model

    dispatch_model(model, {"": "cpu"}, force_hooks=True)


PLACES = [on_cpu, on_cpu_with_buffers, on_disk, over_both, block_by_block, hooks_only]


def stock(tie: bool) -> nn.Module:
    return llama(tie)


def changed(tie: bool) -> nn.Module:
    """Widths that differ by layer, and a module of each kind that holds tensors."""
    model = uneven(llama(tie))
    layers = model.model.layers
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    insert(model, "model.layers.0.mlp.up_proj", Gather.before(layers[0].mlp.up_proj, order))
    factors = LowRank.of(torch.randn(48, 6), torch.randn(6, 48))
    insert(model, "model.layers.0.self_attn.o_proj", factors)
    rotation = Rotation(48, 3, source="model.layers.2.post_attention_layernorm")
    nn.init.normal_(rotation.weight)
    insert(model, "model.layers.2.mlp.rotation", rotation)
    return model.eval()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("make", [stock, changed])
@pytest.mark.parametrize("place", PLACES)
def test_saved_as_it_lies(
    tmp_path: Path,
    tokens: torch.Tensor,
    place: Callable[[nn.Module, Path], None],
    make: Callable[[bool], nn.Module],
    tie: bool,
) -> None:
    model = make(tie)
    want, weights = logits(model, tokens), {n: p.clone() for n, p in model.state_dict().items()}
    place(model, tmp_path)
    assert torch.equal(logits(model, tokens), want)
    away = offload.offloaded(model)
    assert bool(away) == (place is not hooks_only)
    hooks = {n: m.__dict__.get("_hf_hook") for n, m in model.named_modules()}
    save(model, None, tmp_path / "out", max_shard_size="40KB")
    assert {n: m.__dict__.get("_hf_hook") for n, m in model.named_modules()} == hooks
    assert offload.offloaded(model) == away
    assert torch.equal(logits(model, tokens), want)
    again, _ = load(tmp_path / "out")
    state = again.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[n], weights[n]) for n in weights)
    assert torch.equal(logits(again, tokens), want)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie
    written = [
        name for f in (tmp_path / "out").glob("*.safetensors") for name in read_header(f).shapes
    ]
    assert sorted(written) == sorted(n for n in weights if not (tie and n == "lm_head.weight"))


def test_a_model_that_from_pretrained_left_on_disk(tmp_path: Path, tokens: torch.Tensor) -> None:
    dense = llama()
    dense.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map=DEVICES, offload_folder=tmp_path / "offload"
    )
    assert offload.offloaded(model)
    save(model, None, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")[0], tokens), logits(dense, tokens))


def test_weights_that_transformers_stores_in_another_form(
    tmp_path: Path, tokens: torch.Tensor
) -> None:
    """Mixtral's experts are one tensor in memory, and one each on disk."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, pad_token_id=0)).eval()
    want = logits(model, tokens)
    on_cpu(model, tmp_path)
    save(model, None, tmp_path / "out", max_shard_size="150KB")
    assert torch.equal(logits(load(tmp_path / "out")[0], tokens), want)


def test_no_more_than_a_shard_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    whole = sum(p.numel() * 4 for p in model.parameters())
    on_disk(model, tmp_path)
    alive: dict[int, int] = {}
    most = read = 0
    real = offload.stored_value

    def watched(model: nn.Module, name: str) -> torch.Tensor:
        nonlocal most, read
        value = real(model, name)
        read += 1
        alive[read] = value.numel() * 4
        weakref.finalize(value, alive.pop, read)
        most = max(most, sum(alive.values()))
        return value

    monkeypatch.setattr(offload, "stored_value", watched)
    save(model, None, tmp_path / "out", max_shard_size="40KB", check=False)
    assert read == len(list(model.parameters()))
    assert 0 < most <= 41_000 < whole / 3


def test_what_a_loader_would_not_repeat_is_still_found(tmp_path: Path) -> None:
    model = llama()
    model.model.norm.register_forward_hook(lambda module, args, out: out * 2)
    on_cpu(model, tmp_path)
    with pytest.raises(ConfigError, match="logits"):
        save(model, None, tmp_path / "out")


def test_weights_that_are_nowhere_are_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama().config)
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight is neither in memory nor known"):
        save(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())
