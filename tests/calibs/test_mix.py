"""Texts in given shares: counts, order, no repetition, messages."""

from __future__ import annotations

import pytest
import torch

from prunekit.calibs.mix import whole_shares
from prunekit.data.duplicates import new_rows
from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer, tiny_llama
from prunekit.registry import calibs, draw

TOKENIZER = byte_tokenizer()


@pytest.fixture
def files(tmp_path):
    """One file of the letter a and spaced numbers, one of b and numbers."""
    paths = {}
    for letter in "ab":
        words = [f"{letter}{i:04d}" for i in range(2000)]
        lines = [" ".join(words[i : i + 20]) for i in range(0, 2000, 20)]
        paths[letter] = tmp_path / f"{letter}.txt"
        paths[letter].write_text("\n".join(lines))
    return paths


def node(files, **shares):
    texts = {
        k: {"share": s, "name": "text", "path": str(files[k]), "take": "random"}
        for k, s in shares.items()
    }
    return {"name": "mix", "texts": texts, "samples": 8, "length": 48, "seed": 0}


def made(given):
    return draw(calibs.build(given), TOKENIZER, torch.nn.Identity())


def test_every_first_part_of_the_samples_has_the_shares(files):
    tokens = made(node(files, a=3, b=1))
    assert tokens.shape == (8, 48)
    assert tokens.dtype == torch.int64
    letters = ["a" if "a" in TOKENIZER.decode(row) else "b" for row in tokens]
    assert letters.count("a") == 6
    assert letters[:4].count("b") == letters[4:].count("b") == 1


def test_the_seed_alone_decides(files):
    given = node(files, a=1, b=1)
    assert torch.equal(made(given), made(given))
    assert not torch.equal(made(given), made(given | {"seed": 1}))


def test_whole_numbers_add_up():
    assert whole_shares({"a": 1, "b": 1, "c": 1}, 8) == {"a": 3, "b": 3, "c": 2}
    assert whole_shares({"a": 0.5, "b": 0.25, "c": 0.25}, 64) == {"a": 32, "b": 16, "c": 16}


def test_a_text_named_twice_repeats_no_sample(files):
    given = node(files, a=1)
    given["texts"]["again"] = given["texts"]["a"]
    tokens = made(given)
    assert len(tokens) == 8
    assert new_rows(tokens, tokens[:0]).all()


def test_rows_that_mostly_repeat_earlier_text_are_found_at_any_offset():
    text = torch.randint(0, 1000, (400,), generator=torch.Generator().manual_seed(0))
    known, rows = text[:100][None], torch.stack([text[20:120], text[80:180], text[200:300]])
    assert new_rows(rows, known).tolist() == [False, True, True]
    again = torch.cat([rows[1:], rows[1:]])
    assert new_rows(again, known).tolist() == [True, True, False, False]


def test_a_text_that_runs_out_is_named(files):
    files["a"].write_text(("abcdefgh" * 20 + "\n") * 20)
    with pytest.raises(ConfigError, match=r"a has 1 samples of 48 .* its share is 4"):
        made(node(files, a=1, b=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0}, "a needs a share above 0"),
        ({"samples": 3}, "a sets samples: the mix says that"),
        ({"name": "sequence"}, "calib=sequence needs texts"),
        ({"path": "nowhere.txt"}, "is not a file"),
    ],
)
def test_what_cannot_be_mixed_is_refused_before_any_work(files, change, message):
    given = node(files, a=1, b=1)
    given["texts"]["a"] |= change
    if change.get("name"):
        given["texts"]["a"] = {"share": 1, "name": "sequence"}
    with pytest.raises(ConfigError, match=message):
        calibs.build(given)


def test_the_model_writes_a_part_of_the_mix(files):
    model, tokenizer = tiny_llama(device="cpu")
    given = node(files, a=1)
    given["texts"]["own"] = {"share": 1, "name": "self"}
    tokens = draw(calibs.build(given), tokenizer, model)
    assert tokens.shape == (8, 48)
    assert (
        sum("a0" in TOKENIZER.decode(row) or "a1" in TOKENIZER.decode(row) for row in tokens) == 4
    )
