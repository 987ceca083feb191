"""The files that travel with a checkpoint stand for themselves."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import llama, uneven
from safetensors.torch import save_file
from tiny_models import tiny_model
from transformers import AutoConfig

from prunekit import graph
from prunekit.checkpoint import load, save
from prunekit.checkpoint.remote_code import runtime_modules
from prunekit.checkpoint.remote_code.runtime_modules import Bypass, LowRank, insert


def test_loads_where_prunekit_cannot_be_imported(tmp_path: Path, tokens: torch.Tensor) -> None:
    plain = llama()
    graph.remove(
        plain,
        {
            g.name: torch.arange(g.units) % 3 != 0
            for g in graph.discover(plain)
            if g.kind in ("neurons", "heads")
        },
    )
    for name, model in (("code", uneven(llama())), ("stock", plain)):
        save(model, None, tmp_path / name)
        with torch.no_grad():
            save_file(
                {"tokens": tokens, "logits": model(tokens).logits}, tmp_path / f"{name}.safetensors"
            )
    code = """
import sys
sys.modules["prunekit"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for name, flags in (("stock", {}), ("code", {"trust_remote_code": True})):
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", **flags)
    seen = load_file(f"{sys.argv[1]}/{name}.safetensors")
    with torch.no_grad():
        assert torch.equal(model(seen["tokens"]).logits, seen["logits"]), name
"""
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_model_without_a_head_holds_all_that_differs(
    tmp_path: Path, tokens: torch.Tensor
) -> None:
    """Serving engines build it, and put their own head on."""
    from transformers import AutoModel

    model = uneven(llama())
    insert(model, "model.layers.0.self_attn", Bypass(2))
    down = model.model.layers[1].mlp.down_proj.weight.detach()
    insert(model, "model.layers.1.mlp.down_proj", LowRank.of(down[:, :4], torch.eye(4, 46)))
    save(model, None, tmp_path / "checkpoint")
    base = AutoModel.from_pretrained(tmp_path / "checkpoint", trust_remote_code=True)
    assert type(base).__name__ == "PrunedLlamaModel"
    with torch.no_grad():
        seen = base.eval()(tokens).last_hidden_state
        assert torch.equal(seen, model.model(tokens).last_hidden_state)
    base.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).last_hidden_state, seen)


def test_a_model_whose_prefix_names_no_module_is_built_with_and_without_its_head(
    tmp_path: Path,
) -> None:
    """Llama 4's causal class has the prefix `language_model`, and its base model as `model`."""
    from transformers import AutoModel, AutoModelForCausalLM

    model, ids = tiny_model("llama4_text", 4), torch.arange(3, 40)[None]
    graph.remove(model, {"neurons.0": torch.arange(96) >= 24})
    folder = save(model, None, tmp_path / "checkpoint")
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(load(folder)[0](ids).logits, expected)
        remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        assert torch.equal(remote(ids).logits, expected)
        base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(base).__name__ == "PrunedLlama4TextModel"
        seen = base(ids).last_hidden_state
        assert torch.equal(seen, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt_neox", "mixtral"])
def test_per_layer_config_tells_every_layers_heads(tmp_path: Path, kind: str) -> None:
    """Fused matrices included, from whose shapes alone no config field follows."""
    model = tiny_model(kind, layers=3, hidden=96, heads=6, kv=3, head_dim=16)
    kept = {
        g.name: torch.arange(g.units) >= [1, 0, 2][g.layer]
        for g in graph.discover(model)
        if g.kind == "heads"
    }
    units = {g.layer: g.units for g in graph.discover(model) if g.kind == "heads"}
    save(graph.remove(model, kept), None, tmp_path / kind)
    config = AutoConfig.from_pretrained(tmp_path / kind)
    a_unit = 6 // units[0]  # a key/value head with its queries
    for layer, gone in enumerate((1, 0, 2)):
        of_layer = config.per_layer_config[layer]
        assert of_layer.num_attention_heads == (units[layer] - gone) * a_unit
        assert getattr(of_layer, "num_key_value_heads", None) == units[layer] - gone
        width = of_layer.hidden_size // of_layer.num_attention_heads
        assert getattr(of_layer, "head_dim", width) == 16


def test_widths_of_fused_experts_stand_in_a_list_too(tmp_path: Path) -> None:
    """As vLLM reads them; of a model that is pruned again, its own."""
    model = tiny_model("mixtral", layers=2, ffn=40)
    for lost, left in (((3, 0), [37, 40]), ((1, 9), [36, 31])):
        kept = {
            g.name: torch.arange(g.units) >= lost[g.layer]
            for g in graph.discover(model)
            if g.kind == "neurons"
        }
        folder = save(graph.remove(model, kept), None, tmp_path / str(left[0]))
        told = json.loads((folder / "config.json").read_text())
        assert told["moe_intermediate_size"] == left
        model = load(folder)[0]


def test_carried_files_import_nothing_of_prunekit() -> None:
    for file in Path(runtime_modules.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text())
        names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
        names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        tops = {str(name).partition(".")[0] for name in names}
        assert tops <= {
            "__future__",
            "collections",
            "copy",
            "functools",
            "typing",
            "torch",
            "transformers",
        }
        assert len(file.read_text().splitlines()) < 300
