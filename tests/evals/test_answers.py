"""Answers of a model: where they end, what they cost in variety, and what they share with the dense
model's.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fakes import DenseOnce
from tiny_models import tiny_model
from transformers import GenerationConfig

from prunekit.data.prompts import REQUESTS, TO_DECLINE
from prunekit.errors import ConfigError
from prunekit.evals.answering import END, answered, as_prompts, cut_at_end
from prunekit.evals.answers import answers, beside, health
from prunekit.models.tiny import byte_tokenizer

CHAT = "<s>{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=259)


def test_what_comes_after_the_end_is_no_part_of_an_answer():
    said = torch.tensor([[5, 6, 2, 7, 2], [2, 2, 2, 2, 2], [5, 5, 5, 5, 5]])
    ids, stopped = cut_at_end(said, [2], 6)
    assert ids.tolist() == [[5, 6, END, END, END, END], [END] * 6, [5, 5, 5, 5, 5, END]]
    assert stopped.tolist() == [1, 1, 0]
    assert cut_at_end(said, [], 5)[1].tolist() == [0, 0, 0]


def test_an_empty_answer_has_no_variety_and_no_loop():
    ids, stopped = cut_at_end(torch.tensor([[2, 9], [7, 7]]), [2], 2)
    assert health(ids, stopped, "x") == {
        "distinct1_x": 0.25,
        "distinct2_x": 0.5,
        "unique_tokens_x": 0.5,
        "loop_x": 0.5,
        "length_x": 1,
        "stopped_x": 0.5,
    }
    assert beside(["", "a b"], ["", "c"])["f1_greedy"] == 0.5


def test_a_batch_answers_as_each_request_alone(model):
    prompts = as_prompts(byte_tokenizer(), ["Hello", "What is a much longer request?", "x"], False)
    assert len({len(p) for p in prompts}) == 3
    together = answered(model, byte_tokenizer(), prompts, new_tokens=6, batch=3)[0]
    for prompt, row in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(cut_at_end(ids[:, len(prompt) :], [2], 6)[0][0], row)


def test_a_prompt_that_stays_with_the_model_stands_before_each_request():
    model, tokenizer = tiny_model("llama", vocab_size=259), byte_tokenizer()
    said = tokenizer("You are smaller now. ", add_special_tokens=False).input_ids
    plain = answered(model, tokenizer, [[1, *said, 70, 71], [*said, 70]], new_tokens=6, batch=2)
    model.config.collaborative_prompt = "You are smaller now. "
    found = answered(model, tokenizer, [[1, 70, 71], [70]], new_tokens=6, batch=2)
    assert torch.equal(found[0], plain[0])
    assert not torch.equal(found[0][0], found[0][1])


def test_draws_follow_their_seed_and_leave_the_generators_alone(model):
    prompts = as_prompts(byte_tokenizer(), ["Hello"] * 2, False)
    drawn = {"new_tokens": 12, "batch": 2, "temperature": 1.0}
    torch.manual_seed(3)
    first = answered(model, byte_tokenizer(), prompts, seed=1, **drawn)[0]
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(first, answered(model, byte_tokenizer(), prompts, seed=1, **drawn)[0])
    assert not torch.equal(first, answered(model, byte_tokenizer(), prompts, seed=2, **drawn)[0])


def test_the_models_generation_config_says_where_an_answer_ends_and_nothing_else(model):
    prompts = as_prompts(byte_tokenizer(), ["Hello", "x"], False)
    ask = partial(answered, model, byte_tokenizer(), prompts, new_tokens=12, batch=2)
    plain, drawn = ask(), ask(temperature=1.0)
    own = model.generation_config
    model.generation_config = GenerationConfig(repetition_penalty=1.5, min_p=0.3, num_beams=2)
    try:
        assert torch.equal(ask()[0], plain[0])
        assert torch.equal(ask(temperature=1.0)[0], drawn[0])
        model.generation_config.eos_token_id = plain[0][0, :1].tolist()
        assert ask()[0][0, 0] == END
    finally:
        model.generation_config = own


def test_the_dense_model_says_what_the_dense_model_says(model):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    found = answers(model, tokenizer, DenseOnce(model, itself=True), new_tokens=8)
    assert found["same_greedy"] == found["f1_greedy"] == found["rouge_l_greedy"] == 1
    assert found["f1_greedy_stderr"] == 0
    assert {"declined", "declined_harmless", "loop_sampled"} <= set(found)
    assert answers(model, tokenizer, DenseOnce(model), new_tokens=8) == found


def test_another_model_says_something_else(model):
    other = tiny_model("llama", vocab_size=259)
    with torch.no_grad():
        for block in other.model.layers:
            block.mlp.down_proj.weight.zero_()
    found = answers(other, byte_tokenizer(), DenseOnce(model), new_tokens=8, chat=False, limit=4)
    assert found["same_greedy"] < 1
    assert found["f1_greedy"] < 1


def test_requests_of_ones_own_say_nothing_of_refusals(model, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("One\n\nTwo\n")
    dense = DenseOnce(model)
    found = answers(model, byte_tokenizer(), dense, path=str(path), chat=False, new_tokens=4)
    assert "declined" not in found
    assert dense.kept["greedy"]["ids"].shape == (2, 4)


def test_a_chat_needs_a_template(model):
    with pytest.raises(ConfigError, match="chat=false is plain text"):
        answers(model, byte_tokenizer(), DenseOnce(model))


def test_no_request_is_in_both_lists():
    assert not set(REQUESTS) & set(TO_DECLINE)
