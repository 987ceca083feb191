from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from prunekit.data import training_examples
from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer
from prunekit.recoveries.lora import linears, lora
from prunekit.recoveries.none import none
from prunekit.registry import recoveries
from prunekit.types import Group, Member, Pruned

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHORT = {
    "holdout": 0,
    "cutoff": 32,
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


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("the quick brown fox jumps over the lazy dog again and again. " * 40)
    return str(path)


def recover(model: nn.Module, text: str, **over) -> Pruned:
    pruned = Pruned(model, {}, [])
    pruned.model = lora(pruned, byte_tokenizer(), dataset="text", path=text, **{**SHORT, **over})
    return pruned


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
    assert changed == {f"{n}.weight" for n in linears(model)}, (
        "embeddings, head and norms are frozen"
    )
    losses = [r["loss"] for r in pruned.notes["recovery_curve"] if "loss" in r]
    assert losses[-1] < losses[0] - 0.1
    json.dumps(pruned.notes)


def test_merged_weights_compute_what_was_trained(text):
    """What the last held-out look saw, with the updates beside the weights, is what the merged
    model gives.
    """
    pruned = recover(uneven(), text, holdout=4, eval_every=1, max_steps=3, dropout=0.0)
    seen = {r["step"]: r["eval_loss"] for r in pruned.notes["recovery_curve"] if "eval_loss" in r}
    _, held = training_examples.held_out(
        training_examples.load(byte_tokenizer(), "text", None, text, None, 32), 4, 42
    )
    with torch.no_grad():
        loss = float(pruned.model(**training_examples.collate(held)).loss)
    assert pruned.notes["recovery_best_step"] == min(seen, key=seen.get)
    assert loss == pytest.approx(min(seen.values()), rel=1e-4)


def test_the_best_held_out_step_is_kept_not_the_last(text):
    pruned = recover(uneven(), text, holdout=4, eval_every=1, max_steps=6, lr=300.0, warmup_steps=3)
    seen = {r["step"]: r["eval_loss"] for r in pruned.notes["recovery_curve"] if "eval_loss" in r}
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]
    assert pruned.notes["recovery_best_step"] == min(seen, key=seen.get) < 6


def test_the_last_step_is_looked_at_whatever_eval_every_is(text):
    pruned = recover(uneven(), text, holdout=4, eval_every=100)
    assert [r["step"] for r in pruned.notes["recovery_curve"] if "eval_loss" in r] == [4]


def test_same_seed_same_bits_another_seed_others(text):
    one, two, other = (
        recover(uneven(), text, seed=s, dropout=0.1).model.state_dict() for s in (1, 1, 2)
    )
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_nothing_is_left_on_disk(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recover(uneven(), text, holdout=2, eval_every=2)
    assert os.listdir(tmp_path) == ["some.txt"]


def test_zeros_of_weight_groups_stay_zero(text):
    model = llama()
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    with torch.no_grad():
        weight.mul_(mask)
    member = Member(name, -1, torch.empty(0, 0, dtype=torch.int64))
    group = Group("up", "weights", 1, weight.numel(), (member,), shape=tuple(weight.shape))
    before = weight.detach().clone()
    pruned = Pruned(model, {"up": mask}, [group])
    after = lora(pruned, byte_tokenizer(), dataset="text", path=text, **SHORT).get_parameter(name)
    assert (after[~mask] == 0).all()
    assert not torch.equal(after[mask], before[mask])


def test_targets_are_found_and_narrowed():
    model = llama()
    found = linears(model)
    assert [n.rpartition(".")[2] for n in found] == SEVEN * 2
    assert linears(model, ["q_proj", "*.1.mlp.*"]) == [
        n for n in found if n.endswith("q_proj") or ".1.mlp." in n
    ]
    with pytest.raises(ConfigError, match="down_proj.*q_proj"):
        linears(model, ["query"])
    with pytest.raises(ConfigError, match="no list of blocks"):
        linears(nn.Linear(2, 2))


def test_transposed_linears_of_gpt2(text):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=259, bos_token_id=1, eos_token_id=2, **sizes)
    )
    shapes, before = shape_of(model), copy.deepcopy(model.state_dict())
    pruned = recover(model, text, holdout=4, eval_every=4, dropout=0.0)
    assert shape_of(model) == shapes
    changed = {n for n, w in model.state_dict().items() if not torch.equal(before[n], w)}
    assert changed == {f"{n}.weight" for n in linears(model)}
    assert len(changed) == 8
    _, held = training_examples.held_out(
        training_examples.load(byte_tokenizer(), "text", None, text, None, 32), 4, 42
    )
    with torch.no_grad():
        loss = float(model(**training_examples.collate(held)).loss)
    assert loss == pytest.approx(pruned.notes["recovery_curve"][-1]["eval_loss"], rel=1e-4)


def test_alpaca_from_a_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, ALPACA)))
    pruned = Pruned(llama(), {}, [])
    lora(pruned, byte_tokenizer(), path=str(path), **{**SHORT, "cutoff": 400, "holdout": 2})
    assert pruned.notes["recovery_examples"] == 10


def test_only_the_answer_is_learnt_and_the_end_is_appended_if_it_fits():
    tokenizer = byte_tokenizer()
    (example,) = training_examples.instructions(tokenizer, ALPACA[:1], cutoff=400)
    learnt = [x for x in example["labels"] if x != -100]
    assert tokenizer.decode(learnt[:-1]) == ALPACA[0]["output"]
    assert learnt[-1] == tokenizer.eos_token_id
    start = tokenizer.decode(
        [i for i, x in zip(example["input_ids"], example["labels"]) if x == -100]
    )
    assert start.endswith("### Input:\n0 + 0\n\n### Response:\n")
    assert "paired with an input" in start
    full = len(example["input_ids"]) - 1
    (cut,) = training_examples.instructions(tokenizer, ALPACA[:1], cutoff=full)
    assert cut["input_ids"] == example["input_ids"][:-1]
    assert training_examples.instructions(tokenizer, ALPACA[:1], cutoff=20) == [], (
        "no room for an answer"
    )
    plain = training_examples.prompt({"instruction": "Add.", "input": "", "output": "x"})
    assert "Input" not in plain
    assert "paired" not in plain


def test_padding_is_on_the_left_to_a_multiple_of_eight():
    batch = training_examples.collate([{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 11)])
    assert batch["input_ids"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [0] * 13 + [5] * 3
    assert batch["attention_mask"].sum(1).tolist() == [3, 11]
    assert batch["labels"][1].tolist() == [-100] * 5 + [5] * 11


def test_text_is_packed_into_whole_blocks():
    tokenizer = byte_tokenizer()
    blocks = training_examples.packed(tokenizer, "a" * 99, cutoff=32)
    assert [len(b["input_ids"]) for b in blocks] == [32] * 3
    assert [i for b in blocks for i in b["input_ids"]] == tokenizer("a" * 99).input_ids[:96]
    assert all(b["labels"] == [-100, *b["input_ids"][1:]] for b in blocks), (
        "nothing predicts the first token"
    )


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"batch": 5}, "batch=5 is no multiple of micro_batch=2"),
        ({"holdout": 10**6}, "holdout=1000000, but there are"),
        ({"cutoff": 10**6}, "lower cutoff"),
        ({"path": None}, "give path="),
        ({"path": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_what_cannot_be_is_said_before_training(text, over, said):
    model = llama()
    with pytest.raises(ConfigError, match=said):
        lora(
            Pruned(model, {}, []),
            byte_tokenizer(),
            **{"dataset": "text", "path": text, **SHORT, **over},
        )
    assert not any("lora" in n for n, _ in model.named_modules())


def test_several_processes_share_the_batch(monkeypatch):
    from prunekit.training.trainer import accumulation

    monkeypatch.setenv("WORLD_SIZE", "4")
    assert accumulation(64, 4) == 4
    with pytest.raises(ConfigError, match="x 4 processes"):
        accumulation(8, 4)


def test_none_gives_the_pruned_model():
    pruned = Pruned(llama(), {}, [])
    assert none(pruned, None) is pruned.model
    assert {"lora", "none"} <= set(recoveries.names())


def test_alpaca_from_the_data_folder(shared):
    tokenizer = byte_tokenizer()
    found = training_examples.load(tokenizer, "alpaca", None, None, str(shared / "data"), 512)
    assert len(found) > 1000
    assert all(len(e["input_ids"]) == len(e["labels"]) <= 512 for e in found)
