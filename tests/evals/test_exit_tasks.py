"""Early exit on tasks: accuracies with and without it, what is saved, the oracle's bound."""

from __future__ import annotations

import pytest
import torch
from problems import problem

from prunekit.evals.lm_eval_tasks import run_tasks
from prunekit.registry import evals, models, pruners

TEXT = torch.randint(8, 100, (10, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny():
    return models.build({"name": "tiny_llama", "layers": 4, "device": "cpu"})()


def asked(model, tokenizer):
    return evals.build({"name": "exit_tasks", "tasks": ["docs_cloze"], "limit": 12})(
        model, tokenizer
    )


def plain(model, tokenizer):
    how = {"limit": 12, "batch": 1, "bos": None, "seed": 0, "data_root": None}
    return run_tasks(model, tokenizer, ["docs_cloze"], **how)["results"]["docs_cloze"]["acc,none"]


def test_without_early_exit_nothing_is_saved(tiny):
    found = asked(*tiny)
    assert found["acc_docs_cloze"] == found["acc_all_blocks_docs_cloze"]
    assert found["depth_docs_cloze"] == 4
    assert found["blocks_saved_docs_cloze"] == found["oracle_blocks_saved_docs_cloze"] == 0


def test_where_all_leave_at_once_one_block_answers(tiny):
    model, tokenizer = tiny
    before = plain(model, tokenizer)
    pruners.build({"name": "adainfer", "threshold": -1e9})(problem(model, TEXT))
    found = asked(model, tokenizer)
    assert found["acc_all_blocks_docs_cloze"] == before
    assert found["acc_docs_cloze"] == plain(model, tokenizer)  # the gate is open as it was
    assert found["depth_docs_cloze"] == 1
    assert found["blocks_saved_docs_cloze"] == 0.75
    assert 0 < found["oracle_blocks_saved_docs_cloze"] < 0.75


def test_where_none_leaves_the_answers_are_those_of_all_blocks(tiny):
    model, tokenizer = tiny
    pruners.build({"name": "adainfer", "threshold": 1e9})(problem(model, TEXT))
    found = asked(model, tokenizer)
    assert found["acc_docs_cloze"] == found["acc_all_blocks_docs_cloze"]
    assert found["depth_docs_cloze"] == 4
    assert found["compute_saved_docs_cloze"] < 0
