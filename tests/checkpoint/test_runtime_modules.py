"""Modules that no class of transformers has travel in one field of the layout: what was inserted is
what both loaders build, to the bit.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama, narrow, uneven
from tiny_models import logits, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from prunekit import graph
from prunekit.checkpoint import load, save
from prunekit.checkpoint.integrity import CheckpointError, digest, seal
from prunekit.checkpoint.manifest import MANIFEST
from prunekit.checkpoint.remote_code import runtime_modules
from prunekit.checkpoint.remote_code.early_exit import EarlyExit
from prunekit.checkpoint.remote_code.runtime_modules import (
    KINDS,
    Bypass,
    Gather,
    LowRank,
    RuntimeModule,
    insert,
)
from prunekit.checkpoint.remote_code.stream_modules import LateSum, Rotation
from prunekit.errors import ConfigError


def entries(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "config.json").read_text())["prunekit_layout"]["modules"]


def gathered(model: nn.Module) -> nn.Module:
    """The inputs of one matrix shuffled, its columns with them, and every second channel read by
    another.
    """
    layers, order = (
        model.model.layers,
        torch.randperm(64, generator=torch.Generator().manual_seed(1)),
    )
    narrow(layers[0].mlp.down_proj, 1, order)
    insert(model, "model.layers.0.mlp.down_proj", Gather.before(layers[0].mlp.down_proj, order))
    narrow(layers[2].mlp.up_proj, 1, torch.arange(0, 48, 2))
    half = Gather.before(layers[2].mlp.up_proj, torch.arange(0, 48, 2))
    layers[2].mlp.up_proj = half  # a kind that reaches nowhere else needs no `insert`
    return model


def factored(model: nn.Module, rank: int = 5) -> nn.Module:
    """Two matrices of another rank each, one with a bias, cut off from their singular values."""
    for i, name in enumerate(("o_proj", "q_proj")):
        linear = getattr(model.model.layers[i].self_attn, name)
        U, S, V = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        rank += i
        bias = torch.linspace(-1, 1, linear.out_features) if i else None
        factors = LowRank.of(U[:, :rank] * S[:rank], V[:rank], bias)
        insert(model, f"model.layers.{i}.self_attn.{name}", factors)
    return model


def rotated(model: nn.Module) -> nn.Module:
    rotation = Rotation(48, 48)
    nn.init.orthogonal_(rotation.weight)
    insert(model, "model.layers.1.rotation", rotation)
    shortcut = Rotation(48, 4, source="model.layers.2.post_attention_layernorm")
    nn.init.normal_(shortcut.weight, std=0.1)
    insert(model, "model.layers.2.mlp.rotation", shortcut)
    return model


def written_late(model: nn.Module) -> nn.Module:
    late = LateSum(48, 48, "model.norm")
    nn.init.normal_(late.weight, std=0.1)
    insert(model, "model.layers.2.mlp.late_sum", late)
    return model


def bypassed(model: nn.Module) -> nn.Module:
    model.model.layers[1].self_attn = Bypass(outputs=2)
    return model


@torch.no_grad()
def leaving(model: nn.Module) -> nn.Module:
    """Some tokens leave behind the second block, and stay there."""
    module = EarlyExit("model.layers", "model.norm", "lm_head", "self_attn.o_proj", 2, 1)
    module.weight.copy_(torch.tensor([[1.0, 0.5]]))
    module.bias.fill_(-0.4)
    insert(model, "model.early_exit", module)
    return model


MAKE = {
    "gather": gathered,
    "low_rank": factored,
    "rotation": rotated,
    "late_sum": written_late,
    "bypass": bypassed,
    "early_exit": leaving,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MAKE)
def test_both_loaders_give_the_same_to_the_bit(
    tmp_path: Path, tokens: torch.Tensor, kind: str, dtype: torch.dtype
) -> None:
    model = MAKE[kind](llama()).eval().to(dtype)
    want = logits(model, tokens)
    assert not torch.equal(want, logits(llama().to(dtype), tokens))
    save(model, None, tmp_path / "out")
    assert {entry["kind"] for entry in entries(tmp_path / "out")} == {kind}
    ours = load(tmp_path / "out")[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert type(theirs).__module__.startswith("transformers_modules.")
    for again in (ours, theirs):
        state = again.state_dict()
        assert state.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(state[name], tensor), name
            assert state[name].dtype == tensor.dtype, name
        assert torch.equal(logits(again, tokens), want)
    for i, again in enumerate((ours, theirs)):  # classes of the package, and of its carried copy
        save(again, None, tmp_path / f"again{i}")
        assert entries(tmp_path / f"again{i}") == entries(tmp_path / "out")
        assert torch.equal(logits(load(tmp_path / f"again{i}")[0], tokens), want)


def test_a_weight_that_is_read_by_name_is_that_of_the_inputs_in_their_own_order() -> None:
    linear = nn.Linear(6, 4)
    dense = linear.weight.detach().clone()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    narrow(linear, 1, order)
    gather = Gather.before(linear, order)
    assert torch.equal(gather.weight, dense)
    x = torch.randn(2, 6)
    torch.testing.assert_close(gather(x), nn.functional.linear(x, gather.weight, linear.bias))
    with pytest.raises(AttributeError, match="weight"):
        _ = Gather.before(nn.Linear(3, 4), torch.tensor([0, 2, 4])).weight
    pair = LowRank.of(torch.randn(4, 2), torch.randn(2, 6))
    torch.testing.assert_close(pair(x), x @ pair.weight.T)


def test_a_class_that_initialises_a_weight_by_name(tmp_path: Path, tokens: torch.Tensor) -> None:
    """GPT-2's `_init_weights` writes to `c_proj.weight`."""
    model = tiny_model("gpt2")
    for block in model.transformer.h:
        conv = block.attn.c_proj
        inner = nn.Linear(64, 64)
        inner.load_state_dict({"weight": conv.weight.T.flip(1), "bias": conv.bias})
        block.attn.c_proj = Gather.before(inner, torch.arange(63, -1, -1))
    torch.testing.assert_close(logits(model, tokens), logits(tiny_model("gpt2"), tokens))
    save(model, None, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    for again in (load(tmp_path / "out")[0], theirs):
        assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_all_kinds_at_once_on_layers_of_uneven_width(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = uneven(llama(tie=True))
    for make in (factored, bypassed, rotated):
        make(model)
    save(model, None, tmp_path / "out", max_shard_size="20KB")
    again, _ = load(tmp_path / "out")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    with_cache, without = (
        again.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_entries_are_plain_and_complete(tmp_path: Path) -> None:
    save(factored(gathered(llama())), None, tmp_path / "out")
    assert entries(tmp_path / "out") == [
        dict(
            path=f"model.layers.{path}",
            kind=kind,
            inputs=inputs,
            outputs=outputs,
            bias=bias,
            **({"rank": rank} if rank else {}),
        )
        for path, kind, inputs, outputs, rank, bias in (
            ("0.self_attn.o_proj", "low_rank", 48, 48, 5, False),
            ("0.mlp.down_proj", "gather", 64, 48, None, False),
            ("1.self_attn.q_proj", "low_rank", 48, 48, 6, True),
            ("2.mlp.up_proj", "gather", 24, 64, None, False),
        )
    ]
    layout = json.loads((tmp_path / "out" / "config.json").read_text())["prunekit_layout"]
    assert layout.keys() == {"modules"}


def test_a_gather_reads_its_inputs_by_index() -> None:
    linear, index = nn.Linear(3, 2), torch.tensor([4, 0, 4])
    x = torch.randn(2, 5, 6)
    assert torch.equal(Gather.before(linear, index)(x), linear(x[..., [4, 0, 4]]))


def test_factors_multiply_to_the_matrix() -> None:
    left, right, bias = torch.randn(4, 2), torch.randn(2, 6), torch.randn(4)
    x = torch.randn(3, 6)
    torch.testing.assert_close(LowRank.of(left, right, bias)(x), x @ (left @ right).T + bias)


def test_a_copy_of_a_model_holds_its_own_modules(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = rotated(gathered(llama()))
    twin, want = copy.deepcopy(model), logits(model, tokens)
    with torch.no_grad():
        model.model.layers[1].rotation.weight.zero_()
        model.model.layers[0].mlp.down_proj.index.zero_()
    assert torch.equal(logits(twin, tokens), want)
    save(twin, None, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")[0], tokens), want)


def test_arguments_of_which_a_module_sees_a_part_are_such_modules(
    tmp_path: Path, tokens: torch.Tensor
) -> None:
    """BLOOM's ALiBi slopes of a layer with fewer heads, in a batch flattened into the heads."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=100, hidden_size=48, n_layer=2, n_head=6, pad_token_id=0)
    model = BloomForCausalLM(config).eval()
    graph.remove(model, {"heads.0": torch.arange(6) != 2})
    save(model, None, tmp_path / "out")
    (one,) = entries(tmp_path / "out")
    assert one["kind"] == "argument_indices"
    assert (one["axis"], one["size"], one["keep"]) == (0, 6, [0, 1, 3, 4, 5])
    assert torch.equal(logits(load(tmp_path / "out")[0], tokens), logits(model, tokens))


def resealed(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: digest(folder / name) for name in manifest["files"]}
    manifest["seal"] = seal(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def refused(folder: Path, change: dict[str, Any], words: str) -> None:
    """The checkpoint does not load with the first module's entry changed."""
    config = json.loads((folder / "config.json").read_text())
    config["prunekit_layout"]["modules"][0] |= change
    (folder / "config.json").write_text(json.dumps(config))
    resealed(folder)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "pickle"}, "kind 'pickle'; known are"),
        ({"rank": 2.5}, "o_proj"),
        ({"rank": -1}, "o_proj"),
        ({"rank": 7}, "o_proj.*shape"),
        ({"depth": 3}, "depth"),
        ({"path": "model.layers.7.mlp.up_proj"}, r"no module 'model\.layers\.7\.mlp'"),
        ({"path": "model.layers.0.mlp.forward"}, "is not a module"),
        ({"path": "model.config"}, "is not a module"),
        ({"path": "model.layers.0.a b"}, "no name of a module"),
        ({"path": ""}, "no name of a module"),
    ],
)
def test_an_entry_that_fits_nothing_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    refused(save(factored(llama()), None, tmp_path / "out"), change, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm": "model.none"}, r"no module 'model\.none'"),
        ({"head": ""}, "cannot be empty"),
        ({"head": 3}, "names of modules"),
        ({"blocks": "model.stack"}, r"no module 'model\.stack'"),
        ({"reader": "mlp.none"}, r"no module 'mlp\.none'"),
        ({"start": 0}, "no number of blocks"),
        ({"every": True}, "no number of blocks"),
    ],
)
def test_an_exit_that_fits_nothing_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    refused(save(leaving(llama()), None, tmp_path / "out"), change, words)


def test_hooks_of_two_modules_never_share_a_place() -> None:
    model = rotated(llama())
    with pytest.raises(ValueError, match="is a rotation already"):
        rotated(model)


class EarlyMix(RuntimeModule):
    """Mixes what leaves layer `layer` into the input of the last norm, by a share for each
    channel.
    """

    def __init__(self, layer: int, width: int):
        super().__init__()
        self.layer = layer
        self.share = nn.Parameter(torch.zeros(width))
        self.held: Any = None

    def numbers(self) -> dict[str, Any]:
        return {"layer": self.layer, "width": len(self.share)}

    def attach(self, model: nn.Module, path: str) -> None:
        layer = model.get_submodule(f"model.layers.{self.layer}")
        layer.register_forward_hook(self.keep)
        model.get_submodule("model.norm").register_forward_pre_hook(self.mix)

    def keep(self, module: nn.Module, args: Any, out: Any) -> None:
        self.held = out if isinstance(out, torch.Tensor) else out[0]

    def mix(self, module: nn.Module, args: Any) -> Any:
        early, self.held = self.held, None
        return (torch.lerp(args[0], early, self.share),)


def test_a_new_kind_is_one_class_and_one_row(
    tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    early = EarlyMix(0, 48)
    nn.init.uniform_(early.share)
    insert(model, "early_mix", early)
    want = logits(model, tokens)
    with pytest.raises(ConfigError, match="EarlyMix .* KINDS does not list"):
        save(model, None, tmp_path / "out")
    monkeypatch.setitem(KINDS, "early_mix", EarlyMix)
    folder = save(model, None, tmp_path / "out")
    assert entries(folder) == [{"path": "early_mix", "kind": "early_mix", "layer": 0, "width": 48}]
    assert torch.equal(logits(load(folder)[0], tokens), want)
    with (folder / Path(runtime_modules.__file__).name).open("a") as file:
        file.write(f"\n\n{inspect.getsource(EarlyMix)}\n\nKINDS['early_mix'] = EarlyMix\n")
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert torch.equal(logits(again, tokens), want)
