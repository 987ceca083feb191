"""What early exit saves, counted by hand on a small model."""

from __future__ import annotations

import pytest
import torch
from problems import problem
from tiny_models import tiny_model

from prunekit.evals.early_exit import measured
from prunekit.registry import pruners


@pytest.fixture
def text():
    """(10, 24) token ids below 100."""
    return torch.randint(8, 100, (10, 24), generator=torch.Generator().manual_seed(0))


def leaving(text, **options):
    model = tiny_model("llama", layers=4)
    pruners.build({"name": "adainfer", **options})(problem(model, text))
    return model


def test_a_model_without_early_exit_saves_nothing(text):
    assert measured(tiny_model("llama"), text, 4, "text") == {
        "depth": 2.0,
        "blocks_saved": 0.0,
        "compute_saved": 0.0,
        "exit_agreement": 1.0,
        "oracle_blocks_saved": 0.0,
    }


@pytest.mark.parametrize("batch", [1, 4])
def test_all_that_leave_at_once_save_all_but_one_block(text, batch):
    model = leaving(text, threshold=-1e9)
    found = measured(model, text, batch, "text")
    attention = 64 * 80 + 2 * 64 * 40 + 80 * 64
    block, head = attention + 3 * 64 * 96, 128 * 64
    assert found["depth"] == 1
    assert found["blocks_saved"] == 0.75
    assert found["compute_saved"] == pytest.approx(1 - (block + 2 * head) / (4 * block + head))
    assert 0 < found["exit_agreement"] < 1
    assert 0 < found["oracle_blocks_saved"] < 0.75


def test_where_none_leaves_classifying_costs(text):
    model = leaving(text, threshold=1e9)
    found = measured(model, text, 3, "text")
    assert found["depth"] == 4
    assert found["exit_agreement"] == 1
    assert found["compute_saved"] < 0
    assert measured(model, text, 3, "text") == found  # counts begin anew


def test_the_oracle_leaves_where_the_answer_is_first_there(text):
    model = leaving(text, threshold=1e9, start=2)
    with torch.no_grad():
        states = model.model(text, output_hidden_states=True).hidden_states
        answers = [model.lm_head(model.model.norm(x)).argmax(-1) for x in states[2:4]]
        want = model(text).logits.argmax(-1)
    depth = torch.where(answers[0] == want, 2, torch.where(answers[1] == want, 3, 4))
    found = measured(model, text, 5, "text")
    assert found["oracle_blocks_saved"] == pytest.approx(1 - float(depth.double().mean()) / 4)
