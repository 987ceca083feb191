from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from prunekit import graph
from prunekit.architecture.blocks import linear_names
from prunekit.data import training_examples
from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer
from prunekit.problem import Problem
from prunekit.recoveries.lora import check_lora, lora
from prunekit.registry import recoveries
from prunekit.types import Group, Pruned

SHORT = {
    "validation_size": 0,
    "max_length": 32,
    "batch": 4,
    "micro_batch": 2,
    "max_steps": 4,
    "warmup_steps": 0,
    "lr": 1e-2,
    "log_every": 1,
}
ALPACA = [
    {
        "instruction": "Add.",
        "input": f"{i} + {i}",
        "output": f"The sum of the two numbers is {2 * i}.",
    }
    for i in range(12)
]


def llama(**over) -> nn.Module:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=259, head_dim=8, **{**sizes, **over})
    ).eval()


def uneven() -> nn.Module:
    """Block 0 keeps 31 of 48 neurons and one of two kv heads, block 1 keeps all."""
    model = llama()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for module, rows in (
        (attention.q_proj, 16),
        (attention.k_proj, 8),
        (attention.v_proj, 8),
        (mlp.gate_proj, 31),
        (mlp.up_proj, 31),
    ):
        module.weight, module.out_features = nn.Parameter(module.weight.data[:rows].clone()), rows
    for module, columns in ((attention.o_proj, 16), (mlp.down_proj, 31)):
        module.weight, module.in_features = (
            nn.Parameter(module.weight.data[:, :columns].clone()),
            columns,
        )
    return model


def recover(model: nn.Module, text: str, **over) -> Pruned:
    return run_lora(Pruned(model, {}, []), dataset="text", path=text, **over)


def run_lora(pruned: Pruned, **over) -> Pruned:
    problem = Problem(pruned.model, byte_tokenizer())
    pruned.model = lora(problem, pruned, **{**SHORT, **over})
    return pruned


def held_out_loss(model: nn.Module, text: str) -> float:
    """The model's loss on the four validation examples that `recover` sets aside."""
    examples = training_examples.load_examples(byte_tokenizer(), "text", None, text, None, 32)
    _, validation = training_examples.split_validation(examples, 4, 42)
    with torch.no_grad():
        return float(model(**training_examples.collate(validation)).loss)


def shape_of(model: nn.Module) -> dict:
    return {
        n: (type(m), m.forward.__func__ if hasattr(m.forward, "__func__") else None)
        for n, m in model.named_modules()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pruned_model_learns_and_comes_back_plain(text, dtype):
    model = uneven().to(dtype)
    model.model.norm.weight.requires_grad_(False)
    before, keys, shapes = copy.deepcopy(model.state_dict()), set(model.__dict__), shape_of(model)
    config = copy.deepcopy(model.config.to_dict())
    pruned = recover(model, text, max_steps=30)
    assert pruned.model is model
    assert shape_of(model) == shapes
    assert set(model.__dict__) == keys
    assert model.config.to_dict() == config
    assert not model.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None and p.dtype is dtype for p in model.parameters())
    after = model.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {f"{n}.weight" for n in linear_names(model)}, (
        "embeddings, head and norms are frozen"
    )
    losses = [r["loss"] for r in pruned.notes["recovery_curve"] if "loss" in r]
    assert losses[-1] < losses[0] - 0.1
    json.dumps(pruned.notes)


def test_merged_weights_compute_what_was_trained(text):
    """What the last held-out look saw, with the updates beside the weights, is what the merged
    model gives.
    """
    pruned = recover(uneven(), text, validation_size=4, eval_every=1, max_steps=3, dropout=0.0)
    seen = {r["step"]: r["eval_loss"] for r in pruned.notes["recovery_curve"] if "eval_loss" in r}
    loss = held_out_loss(pruned.model, text)
    assert pruned.notes["recovery_best_step"] == min(seen, key=seen.get)
    assert loss == pytest.approx(min(seen.values()), rel=1e-4)


def test_the_best_held_out_step_is_kept_not_the_last(text):
    options = {"validation_size": 4, "eval_every": 1, "dropout": 0.0}
    pruned = recover(uneven(), text, max_steps=6, lr=30.0, warmup_steps=3, **options)
    seen = {r["step"]: r["eval_loss"] for r in pruned.notes["recovery_curve"] if "eval_loss" in r}
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]
    best, step = min((v, k) for k, v in seen.items() if v is not None)  # None: it diverged
    assert pruned.notes["recovery_best_step"] == step < 6
    assert held_out_loss(pruned.model, text) == pytest.approx(best, rel=1e-4)


def test_the_last_step_is_looked_at_whatever_eval_every_is(text):
    pruned = recover(uneven(), text, validation_size=4, eval_every=100)
    assert [r["step"] for r in pruned.notes["recovery_curve"] if "eval_loss" in r] == [4]


def test_same_seed_same_bits_another_seed_others(text):
    one, two, other = (
        recover(uneven(), text, seed=s, dropout=0.1).model.state_dict() for s in (1, 1, 2)
    )
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_nothing_is_left_on_disk(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recover(uneven(), text, validation_size=2, eval_every=2)
    assert os.listdir(tmp_path) == ["some.txt"]


def test_transposed_linears_of_gpt2(text):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=259, bos_token_id=1, eos_token_id=2, **sizes)
    )
    shapes, before = shape_of(model), copy.deepcopy(model.state_dict())
    pruned = recover(model, text, validation_size=4, eval_every=4, dropout=0.0)
    assert shape_of(model) == shapes
    changed = {n for n, w in model.state_dict().items() if not torch.equal(before[n], w)}
    assert changed == {f"{n}.weight" for n in linear_names(model)}
    assert len(changed) == 8
    loss = held_out_loss(model, text)
    assert loss == pytest.approx(pruned.notes["recovery_curve"][-1]["eval_loss"], rel=1e-4)


def test_alpaca_from_a_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, ALPACA)))
    pruned = Pruned(llama(), {}, [])
    run_lora(pruned, path=str(path), max_length=400, validation_size=2)
    assert pruned.notes["recovery_examples"] == 10


def zeroed(model: nn.Module, kind: str) -> Pruned:
    """Half of the units of a kind set to zero where they stand, as `pruner.compress=false` does."""
    groups = [g for g in graph.discover(model, verify=False) if g.kind == kind]
    kept = {g.name: torch.arange(g.units) % 2 == 0 for g in groups}
    graph.zero(model, kept)
    return Pruned(model, kept, groups)


def weights(model: nn.Module) -> Pruned:
    """Half of the elements of one matrix set to zero."""
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    with torch.no_grad():
        weight.mul_(mask)
    group = Group("up", "weights", 1, weight.numel(), shape=tuple(weight.shape), matrix=name)
    return Pruned(model, {"up": mask}, [group])


@pytest.mark.parametrize("kind", ["neurons", "heads", "hidden", "blocks", "weights"])
def test_what_pruning_set_to_zero_is_zero_after_recovery(text, kind):
    model = llama()
    pruned = weights(model) if kind == "weights" else zeroed(model, kind)
    zeros = {n: p == 0 for n, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    assert sum(int(z.sum()) for z in zeros.values()) > 500
    run_lora(pruned, dataset="text", path=text)
    for name, parameter in model.named_parameters():
        assert not parameter[zeros[name]].any(), name
    changed = [n for n, p in model.named_parameters() if not torch.equal(before[n], p)]
    assert len(changed) == (7 if kind == "blocks" else 14), "the rest of every matrix has learnt"


@pytest.mark.parametrize("kind", ["neurons", "heads", "hidden"])
def test_units_that_are_zero_are_zero_while_training_too(text, kind):
    """So the loss seen in training is that of the merged model."""
    pruned = zeroed(llama(), kind)
    options = {"validation_size": 4, "eval_every": 1, "dropout": 0.0, "lr": 3e-2}
    run_lora(pruned, dataset="text", path=text, **options)
    seen = [r["eval_loss"] for r in pruned.notes["recovery_curve"] if "eval_loss" in r]
    assert held_out_loss(pruned.model, text) == pytest.approx(min(seen), rel=1e-4)


def test_targets_narrow_what_is_trained(text):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    recover(model, text, targets=["mlp.*", "q_proj"])
    changed = {n for n, w in model.state_dict().items() if not torch.equal(before[n], w)}
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
    assert changed == {f"model.layers.{i}.{n}.weight" for i in range(2) for n in names}


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"batch": 5}, "batch=5 is no multiple of micro_batch=2"),
        ({"targets": ["query"]}, r"targets=\['query'\] match no linear.*mlp.down_proj"),
        ({"path": None}, "give path="),
        ({"patience": 2, "validation_size": 0}, "patience=2 .* sets none aside"),
        ({"dataset": "wikitext2", "split": "tset", "path": None}, "no split 'tset'"),
        ({"validation_size": 10**6}, "validation_size=1000000, but there are"),
        ({"max_length": 10**6}, "lower max_length"),
        ({"path": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_what_cannot_be_is_said_before_training(text, over, said):
    model = llama()
    options = {"dataset": "text", "path": text, **over}
    with pytest.raises(ConfigError, match=said):
        run_lora(Pruned(model, {}, []), **options)
    assert not any("lora" in n for n, _ in model.named_modules())


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({}, None),
        ({"batch": 5, "micro_batch": 2}, "batch=5 is no multiple of micro_batch=2"),
        ({"targets": ["query"]}, r"targets=\['query'\] match no linear.*mlp.down_proj"),
        ({"dataset": "text"}, "give path="),
        ({"patience": 2, "validation_size": 0}, "patience=2 .* sets none aside"),
        ({"split": "tset"}, "alpaca has no split 'tset'; there are: train"),
    ],
)
def test_options_are_checked_on_a_model_without_weights(over, said):
    entry = recoveries.entry("lora")
    assert entry.meta["check"] is check_lora
    with torch.device("meta"):
        model = llama()
    if said is None:
        entry.meta["check"](model, **entry.defaults | over)
    else:
        with pytest.raises(ConfigError, match=said):
            entry.meta["check"](model, **entry.defaults | over)


def test_a_missing_file_is_refused_with_the_options():
    with pytest.raises(ConfigError, match=r"nowhere.txt'? is not a file"):
        recoveries.build({"name": "lora", "path": "nowhere.txt"})
    with pytest.raises(ConfigError, match="data_root='nowhere' is not a folder"):
        recoveries.build({"name": "lora", "data_root": "nowhere"})
