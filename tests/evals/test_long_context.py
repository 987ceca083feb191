"""Perplexity by position and needles, on models whose answer is known."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tiny_models import tiny_model

from prunekit.errors import ConfigError
from prunekit.evals import needle as needles
from prunekit.evals.positions import check_positions
from prunekit.evals.windows import cut, token_ids
from prunekit.models.tiny import byte_tokenizer
from prunekit.registry import calibs, evals


def test_the_parts_of_a_window_are_those_of_a_loop(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(random.Random(0).choices("abcdef \n", k=200)))
    model, tokenizer = tiny_model("llama", vocab_size=259), byte_tokenizer()
    node = {"name": "positions", "texts": {"mine": {"path": str(path)}}, "window": 32}
    found = evals.build(node | {"edges": [5, 20], "limit": 2})(model, tokenizer)
    windows = cut(token_ids(path.read_text(), tokenizer, False), 32)[[0, 3]]
    with torch.no_grad():
        log_p = model(input_ids=windows).logits.double().log_softmax(-1)
    for start, end in ((1, 5), (5, 20), (20, 32)):
        losses = [-log_p[n, t - 1, windows[n, t]] for n in range(2) for t in range(start, end)]
        expected = math.exp(float(torch.stack(losses).mean()))
        assert found[f"ppl_mine_{start}to{end}"] == pytest.approx(expected, rel=1e-4)
        assert found[f"ppl_mine_{start}to{end}_stderr"] > 0


@pytest.mark.parametrize("edges", [[20, 5], [0], [32], [5, 5], [40]])
def test_edges_that_do_not_cut_a_window_are_refused(edges):
    with pytest.raises(ConfigError, match="must increase"):
        check_positions(calibs.build({"name": "crop"}), edges=edges, window=32)


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_a_needle_is_said_once_at_its_depth(depth):
    tokenizer = byte_tokenizer()
    text = token_ids("hay " * 200, tokenizer, False)
    ids, number = needles.haystack(text, tokenizer, 300, depth, 2, random.Random(0))
    said = tokenizer.decode(ids)
    assert len(ids) == 300
    assert said.count(number) == 1
    assert said.endswith("is")
    before = len(said.partition("\n\nThe number of")[0])
    room = said.count("hay") * 4
    assert before == pytest.approx(depth * room, abs=8)


def test_a_text_that_is_too_short_is_refused():
    tokenizer = byte_tokenizer()
    text = token_ids("hay " * 10, tokenizer, False)
    for length in (300, 100):
        with pytest.raises(ConfigError, match="are needed"):
            needles.haystack(text, tokenizer, length, 0.5, 0, random.Random(0))


def test_what_is_found_is_counted_by_depth(monkeypatch):
    """The needles at the beginning are found, a prompt's own words count for nothing."""
    tokenizer = byte_tokenizer()
    end = 259

    def answered(model, tokenizer, prompts, *, new_tokens, batch):
        texts = [tokenizer.decode(p) for p in prompts]
        numbers = [t.partition(" is ")[2][:4] for t in texts]
        said = [n if i < 3 else "no" for i, n in enumerate(numbers)]
        rows = [tokenizer(t, add_special_tokens=False).input_ids for t in said]
        ids = torch.full((len(rows), new_tokens), -1)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids, torch.ones(len(rows))

    monkeypatch.setattr(needles, "answered", answered)
    node = {"name": "needle", "length": end, "depths": [0.0, 1.0], "items": 3}
    found = evals.build(node)(None, tokenizer)
    assert found == {"needle_259": 0.5, "needle_259_at0": 1, "needle_259_at100": 0}
