"""A prompt under which a model was pruned stands before what it is trained on afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_model

from prunekit import graph
from prunekit.models.tiny import byte_tokenizer
from prunekit.problem import Problem
from prunekit.registry import recoveries
from prunekit.types import Pruned

PROMPT = "You were cut."
TRAINED = {"max_length": 16, "batch": 2, "micro_batch": 2, "max_steps": 2, "warmup_steps": 0}
OPTIONS = {
    "lora": TRAINED | {"validation_size": 2},
    "perp": TRAINED | {"validation_size": 2},
    "distill": TRAINED | {"validation_size": 2},
    "transfer": TRAINED | {"examples": 8},
    "reconstruct": {"length": 16, "samples": 2, "steps": 2, "batch": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_stands_before_every_example(name, text):
    model = tiny_model("llama", hidden=32, ffn=48, head_dim=8, vocab_size=259)
    dense = copy.deepcopy(model)
    groups = [g for g in graph.discover(model, verify=False) if g.kind == "neurons"]
    kept = {g.name: torch.arange(g.units) % 2 == 0 for g in groups}
    graph.zero(model, kept)
    model.config.collaborative_prompt = PROMPT
    tokenizer, seen = byte_tokenizer(), []
    expected = tokenizer(PROMPT, add_special_tokens=False).input_ids
    for of in (model, dense):
        of.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    node = {"name": name, "dataset": "text", "path": text, **OPTIONS[name]}
    problem = Problem(model, tokenizer, load_dense=lambda: dense)
    recoveries.build(node)(problem, Pruned(model, kept, groups))
    rows = [row.tolist() for batch in seen for row in batch]
    assert rows
    for row in rows:
        places = [i for i in range(9) if row[i : i + len(expected)] == expected]
        assert len(places) == 1  # behind pads and the token that begins a text
