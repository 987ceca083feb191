"""Text that the model writes itself: its distribution, its generator, what it may not say."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from prunekit.data.generation import Sampling, generate_rows, no_generation_config
from prunekit.errors import ConfigError
from prunekit.models.tiny import tiny_llama
from prunekit.registry import calibs, draw


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = tiny_llama(layers=2, device="cpu")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # logits that a temperature can change
    return model, tokenizer


def made(tiny, **options):
    node = {"name": "self", "samples": 6, "length": 24, "batch": 4, "seed": 0} | options
    return draw(calibs.build(node), tiny[1], tiny[0])


def test_rows_have_the_asked_shape_no_special_token_and_private_seeds(tiny):
    state = torch.get_rng_state()
    tokens = made(tiny)
    assert tokens.shape == (6, 24)
    assert tokens.dtype == torch.int64
    assert not torch.isin(tokens, torch.tensor(tiny[1].all_special_ids)).any()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tokens, made(tiny))
    assert not torch.equal(tokens, made(tiny, seed=1))


def test_a_generation_config_of_the_model_does_not_shape_the_text(tiny):
    plain = made(tiny)
    own = tiny[0].generation_config
    theirs = GenerationConfig(top_k=1, repetition_penalty=1.5, min_p=0.3)
    tiny[0].generation_config = theirs
    try:
        assert torch.equal(made(tiny), plain)
        assert tiny[0].generation_config is theirs
        with pytest.raises(RuntimeError), no_generation_config(tiny[0]):
            raise RuntimeError
        assert tiny[0].generation_config is theirs
    finally:
        tiny[0].generation_config = own


def test_dialogues_begin_where_the_template_lets_a_user_speak_and_go_on_over_ends_of_turns(tiny):
    model, tokenizer = tiny
    with pytest.raises(ConfigError, match="no chat template"):
        made(tiny, chat=True)
    tokenizer.chat_template = "{% for m in messages %}hello {{ m.content }}{% endfor %}"
    model.generation_config.eos_token_id = list(range(10, 200))
    try:
        opening = tokenizer("hello ", add_special_tokens=False)["input_ids"]
        tokens = made(tiny, chat=True)
        assert tokens.shape == (6, 24)
        assert tokens[:, : len(opening)].tolist() == [opening] * 6
        assert len({tuple(row) for row in tokens.tolist()}) == 6
        assert torch.isin(tokens[:, len(opening) :], torch.arange(10, 200)).any()
        with pytest.raises(ConfigError, match="leaves none"):
            made(tiny, chat=True, length=len(opening))
    finally:
        tokenizer.chat_template = None
        model.generation_config.eos_token_id = None


def test_a_low_temperature_says_what_is_likeliest(tiny):
    model, _ = tiny
    tokens = made(tiny, temperature=1e-4)
    logits = model(tokens).logits[:, :-1]
    logits[..., :3] = -torch.inf
    assert torch.equal(logits.argmax(-1), tokens[:, 1:])
    assert not torch.equal(made(tiny), tokens)


def test_tokens_follow_the_distribution_of_the_model(tiny):
    model, _ = tiny
    start = torch.full((4000, 1), 50)
    how = Sampling(temperature=2.0, seed=0, batch=4000)
    rows = generate_rows(model, start, 2, how, banned=[0, 1, 2])
    logits = model(start[:1]).logits[0, -1] / 2.0
    logits[:3] = -torch.inf
    share = torch.bincount(rows[:, 1], minlength=len(logits)) / 4000
    assert (share - logits.softmax(-1)).abs().sum() < 0.25


def test_what_cannot_be_written_is_refused(tiny):
    with pytest.raises(ConfigError, match="length=1: .*greater than or equal to 2"):
        made(tiny, length=1)
    with pytest.raises(ConfigError, match="cannot generate"):
        made((torch.nn.Linear(2, 2), tiny[1]))
    with pytest.raises(ConfigError, match="greater than 0"):
        made(tiny, temperature=0)
