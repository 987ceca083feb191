"""Perplexity: the protocol's windows, its mean against a loop in float64, and the peers' numbers on
the real model.
"""

from __future__ import annotations

import math

import pytest
import torch

from prunekit.errors import ConfigError
from prunekit.evals.windows import cut, token_ids
from prunekit.models.tiny import byte_tokenizer
from prunekit.registry import evals, models

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def tiny():
    return models.build({"name": "tiny_llama", "layers": 2, "device": "cpu"})()


def test_windows_do_not_overlap_and_the_tail_is_dropped():
    ids = torch.arange(103)
    assert torch.equal(cut(ids, 10).flatten(), torch.arange(100))
    assert torch.equal(cut(ids, 10, limit=3).flatten(), torch.arange(30))
    assert torch.equal(cut(ids, 10, block=20, every=2)[:, 0], torch.tensor([0, 10, 40, 50, 80, 90]))
    with pytest.raises(ConfigError, match="103 tokens, not one block of 128"):
        cut(ids, 128)
    with pytest.raises(ConfigError, match="block=25 is no multiple of window=10"):
        cut(ids, 10, block=25)


def test_one_bos_in_front_of_everything():
    plain = TOKENIZER("ab", add_special_tokens=False).input_ids
    assert token_ids("ab", TOKENIZER, None).tolist() == [TOKENIZER.bos_token_id, *plain]
    assert token_ids("ab", TOKENIZER, True).tolist() == [TOKENIZER.bos_token_id, *plain]
    assert token_ids("ab", TOKENIZER, False).tolist() == plain


def test_value_and_error_agree_with_a_loop(tiny, tmp_path):
    model, tokenizer = tiny
    file = tmp_path / "story.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    found = evals.build(
        {"name": "perplexity", "path": str(file), "window": 32, "limit": 11, "batch": 4}
    )(model, tokenizer)
    ids = torch.tensor(tokenizer(file.read_text()).input_ids)[: 32 * 11].view(11, 32)
    means = []
    for row in ids:
        logits = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
        means.append(-sum(logits[i, row[i + 1]].item() for i in range(31)) / 31)
    mean = sum(means) / 11
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / 10 / 11)
    assert found == {
        "ppl_story_32": pytest.approx(math.exp(mean), rel=1e-5),
        "ppl_story_32_stderr": pytest.approx(math.exp(mean) * spread, rel=1e-4),
    }


def test_batch_does_not_matter_and_the_model_is_left_as_found(tiny):
    model, tokenizer = tiny
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    cache = model.config.use_cache
    one, four = (
        evals.build({"name": "perplexity", "limit": 6, "window": 64, "batch": b})(model, tokenizer)
        for b in (1, 4)
    )
    assert one["ppl_pydocs_64"] == pytest.approx(four["ppl_pydocs_64"], rel=1e-6)
    assert [m.training for m in model.modules()] == modes
    assert model.config.use_cache == cache
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model.eval()


def test_twice_the_same_to_the_last_bit(tiny):
    measure = evals.build({"name": "perplexity", "limit": 6})
    assert measure(*tiny) == measure(*tiny)


def test_label_and_messages(tiny, tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text('{"text": "' + "abcdefgh" * 8 + '"}\n' * 1)
    found = evals.build({"name": "perplexity", "path": str(file), "label": "mine", "window": 16})(
        *tiny
    )
    assert set(found) == {"ppl_mine_16", "ppl_mine_16_stderr"}
    with pytest.raises(ConfigError, match="is not a file"):
        evals.build({"name": "perplexity", "path": str(tmp_path / "missing.txt")})
    with pytest.raises(ConfigError, match="wikitext2"):
        evals.build({"name": "perplexity", "dataset": "wikitext3"})


@pytest.mark.slow
@pytest.mark.parametrize(("window", "limit", "expected"), [(128, 64, 49.8), (1024, 8, 19.9)])
def test_the_peers_numbers(shared, smollm2, window, limit, expected):
    """docs/peers.md: every fifth block of 1,024 of the tokenised test text, cut into windows;
    float32 here, bfloat16 there.
    """
    path = str(shared / "data" / "wikitext2_tokenised" / "test.txt")
    node = {
        "name": "perplexity",
        "path": path,
        "label": "peers",
        "bos": False,
        "block": 1024,
        "every": 5,
        "window": window,
        "limit": limit,
    }
    found = evals.build(node)(*smollm2)
    assert found[f"ppl_peers_{window}"] == pytest.approx(expected, rel=0.01)


def test_a_prompt_that_stays_with_the_model_stands_before_each_window(tiny, tmp_path):
    model, tokenizer = tiny
    file = tmp_path / "story.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    measure = evals.build({"name": "perplexity", "path": str(file), "window": 32, "limit": 2})
    model.config.collaborative_prompt = "You are smaller now. "
    try:
        found = measure(model, tokenizer)["ppl_story_32"]
    finally:
        del model.config.collaborative_prompt
    said = tokenizer("You are smaller now. ", add_special_tokens=False).input_ids
    losses = []
    for row in torch.tensor(tokenizer(file.read_text()).input_ids)[:64].view(2, 32).tolist():
        logits = (
            model(input_ids=torch.tensor([[*said, *row]]))
            .logits[0]
            .detach()
            .double()
            .log_softmax(-1)
        )
        losses += [-float(logits[len(said) + i, row[i + 1]]) for i in range(31)]
    assert found == pytest.approx(math.exp(sum(losses) / 62), rel=1e-5)
    assert found != pytest.approx(measure(model, tokenizer)["ppl_story_32"], rel=1e-4)
