"""Questions of our own, asked of a model whose answers are known."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from prunekit.data.prompts import QUESTIONS
from prunekit.evals import questions as module
from prunekit.evals.text_scores import names_one
from prunekit.models.tiny import byte_tokenizer
from prunekit.registry import evals


def test_the_evidence_has_the_answer_among_other_sentences():
    for i, item in enumerate(QUESTIONS):
        said = module.evidence(i)
        assert item.evidence in said
        assert names_one(said, item.answers)
        assert said.count(".") == module.OTHERS + 1
    assert len({module.evidence(i).index(QUESTIONS[i].evidence) > 0 for i in range(8)}) == 2


def test_a_model_that_copies_is_right_where_it_may_look(monkeypatch):
    """It says its prompt's first line again; what it says on a second line does not count."""

    def answered(model, tokenizer, prompts, *, new_tokens, batch):
        rows = []
        for prompt in prompts:
            first, _, _ = tokenizer.decode(prompt, skip_special_tokens=True).partition("\n")
            text = f"{first}\nParis" if "Answer in" not in first else "no\nParis"
            rows.append(tokenizer(text, add_special_tokens=False).input_ids)
        ids = torch.full((len(rows), max(map(len, rows))), -1)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids, torch.ones(len(rows))

    monkeypatch.setattr(module, "answered", answered)
    found = evals.build({"name": "questions", "chat": False})(None, byte_tokenizer())
    assert found["acc_questions_closed"] == 0
    assert found["acc_questions_open"] == 1
    assert found["acc_questions_open_stderr"] == 0


def test_a_random_model_knows_nothing():
    model = tiny_model("llama", vocab_size=259, max_position_embeddings=1024)
    node = {"name": "questions", "chat": False, "limit": 3, "new_tokens": 4}
    found = evals.build(node)(model, byte_tokenizer())
    assert found["acc_questions_closed"] == pytest.approx(0)
