"""Compresso: exact counts, the masked model is the exported one, a prompt that stays with it."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from problems import check, problem, uniform
from tiny_models import tiny_model

from prunekit.architecture.sizes import Sizes
from prunekit.checkpoint import load, save
from prunekit.data.kept_prompt import with_prompt
from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer
from prunekit.pruners.compresso import PROMPT
from prunekit.registry import pruners

FAST = {"steps": 3, "batch": 2, "micro_batch": 1, "warmup_steps": 0, "r": 2, "max_length": 400}


@pytest.fixture
def alpaca(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def prune(model, path, share=0.3, ranking="global", **options):
    ratio = uniform(share, "prunable", ranking=ranking)
    pruner = pruners.build({"name": "compresso", **FAST, "path": path, **options})
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    asked = dataclasses.replace(problem(model, tokens, ratio=ratio), tokenizer=byte_tokenizer())
    return pruner(asked)


def wide(arch, positions=1024):
    """A tiny model with room for bytes in its vocabulary, and for the prompt."""
    model = tiny_model(arch, max_position_embeddings=positions)
    model.resize_token_embeddings(260, mean_resizing=False)
    return model.eval()


def test_an_exact_constraint_expects_what_goes(alpaca):
    """All but what the last step still moves."""
    options = {"constraint": "exact", "warmup": 0.0, "mask_lr": 1e-3, "kinds": ["neurons"]}
    notes = prune(wide("gpt2"), alpaca, **options).notes
    assert notes["sparsity"] == pytest.approx(notes["target"], abs=1e-3)


def test_ratio_zero_changes_nothing(alpaca):
    model = wide("llama")
    before = copy.deepcopy(model.state_dict())
    assert prune(model, alpaca, share=0.0).kept == {}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model.config, "collaborative_prompt")


@pytest.mark.parametrize("arch", ["gemma2", "gpt2"])
def test_the_budget_is_kept_and_masked_is_exported(arch, alpaca, tokens, masked):
    model, kinds = wide(arch), ["heads", "neurons"]
    kinds += ["hidden"] * (arch != "gpt2")
    prunable = Sizes(model, problem(model).units(kinds)).prunable()
    before = sum(p.numel() for p in model.parameters())
    out = prune(model, alpaca, kinds=kinds)
    removed = before - sum(p.numel() for p in model.parameters())
    assert 0.2 * prunable < removed <= 0.3 * prunable
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, masked["logits"], rtol=1e-4, atol=1e-4)
    assert out.notes["target"] == pytest.approx(0.3, abs=0.01)


def test_the_prompt_is_saved_with_the_model(alpaca, tokens, tmp_path):
    model = wide("llama")
    out = prune(model, alpaca)
    save(model, byte_tokenizer(), tmp_path / "model", kept=out.kept, groups=out.groups)
    again, _ = load(tmp_path / "model")
    assert again.config.collaborative_prompt == PROMPT == out.notes["prompt"]
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_a_ratio_that_does_not_let_masks_choose_is_told(ranking, alpaca, caplog):
    prune(wide("llama"), alpaca, ranking=ranking, prompt=False)
    assert ("what goes is not what they learn" in caplog.text) == (ranking == "local")


def test_masks_far_from_the_target_are_told(alpaca, caplog):
    assert prune(wide("llama"), alpaca, prompt=False).notes["sparsity"] < 0.05
    assert "of the prunable parameters to go, and 30.0 % go" in caplog.text


def test_masks_close_as_the_constraint_says(alpaca):
    out = prune(wide("llama"), alpaca, steps=30, warmup=0.3, mask_lr=0.3, prompt=False)
    assert 0.1 < out.notes["sparsity"] <= 1


def test_the_prompt_comes_first_and_is_not_learnt():
    tokenizer = byte_tokenizer()
    ids = tokenizer(PROMPT, add_special_tokens=False).input_ids
    row = {"input_ids": [tokenizer.bos_token_id, 5, 6], "labels": [-100, 5, 6]}
    model = tiny_model("llama")
    assert with_prompt([row], model, tokenizer) == [row]
    model.config.collaborative_prompt = PROMPT
    (found,) = with_prompt([row], model, tokenizer)
    begin = row["input_ids"][:1] if tokenizer.bos_token_id is not None else []
    assert found["input_ids"] == [*begin, *ids, *row["input_ids"][len(begin) :]]
    assert found["labels"] == [-100] * (len(ids) + 1) + [5, 6]


def test_without_the_prompt_none_is_kept(alpaca):
    model = wide("llama")
    prune(model, alpaca, prompt=False)
    assert not hasattr(model.config, "collaborative_prompt")


def test_examples_longer_than_the_model_are_refused(alpaca):
    with pytest.raises(ConfigError, match="256 positions"):
        prune(wide("llama", 256), alpaca)


def test_gates_between_0_and_1_need_rmsnorm():
    with pytest.raises(ConfigError, match="leave out kind hidden"):
        check("compresso", problem(tiny_model("gpt2"), ratio=uniform(0.2, "prunable")))
