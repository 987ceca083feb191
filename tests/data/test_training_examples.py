"""Training examples: what is learnt of an instruction, blocks of text, padding, the split."""

from __future__ import annotations

import pytest

from prunekit.data import training_examples
from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer

ALPACA = [
    {
        "instruction": "Add.",
        "input": f"{i} + {i}",
        "output": f"The sum of the two numbers is {2 * i}.",
    }
    for i in range(12)
]


def test_only_the_answer_is_learnt_and_the_end_is_appended_if_it_fits():
    tokenizer = byte_tokenizer()
    (example,) = training_examples.instructions(tokenizer, ALPACA[:1], max_length=400)
    learnt = [x for x in example["labels"] if x != -100]
    assert tokenizer.decode(learnt[:-1]) == ALPACA[0]["output"]
    assert learnt[-1] == tokenizer.eos_token_id
    start = tokenizer.decode(
        [i for i, x in zip(example["input_ids"], example["labels"]) if x == -100]
    )
    assert start.endswith("### Input:\n0 + 0\n\n### Response:\n")
    assert "paired with an input" in start
    full = len(example["input_ids"]) - 1
    (cut,) = training_examples.instructions(tokenizer, ALPACA[:1], max_length=full)
    assert cut["input_ids"] == example["input_ids"][:-1]
    tokenizer.truncation_side = "left"
    (short,) = training_examples.instructions(tokenizer, ALPACA[:1], max_length=full - 5)
    assert short == {key: values[: full - 5] for key, values in example.items()}
    assert training_examples.instructions(tokenizer, ALPACA[:1], max_length=20) == [], (
        "no room for an answer"
    )
    plain = training_examples.prompt({"instruction": "Add.", "input": "", "output": "x"})
    assert "Input" not in plain
    assert "paired" not in plain


def test_padding_is_on_the_right_to_a_multiple_of_eight():
    batch = training_examples.collate([{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 11)])
    assert batch["input_ids"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [5] * 3 + [0] * 13
    assert batch["attention_mask"].tolist() == [[1] * n + [0] * (16 - n) for n in (3, 11)]
    assert batch["labels"][1].tolist() == [5] * 11 + [-100] * 5


def test_text_is_packed_into_whole_blocks():
    tokenizer = byte_tokenizer()
    blocks = training_examples.packed(tokenizer, "a" * 99, max_length=32)
    assert [len(b["input_ids"]) for b in blocks] == [32] * 3
    assert [i for b in blocks for i in b["input_ids"]] == tokenizer("a" * 99).input_ids[:96]
    assert all(b["labels"] == [-100, *b["input_ids"][1:]] for b in blocks), (
        "nothing predicts the first token"
    )


@pytest.mark.parametrize("least", [2, 6, 12, 13])
def test_no_more_is_tokenized_than_it_takes(least, monkeypatch):
    monkeypatch.setattr(training_examples, "CHUNK", 2)
    monkeypatch.setattr(training_examples, "CHARACTERS", 1)
    found = training_examples.instructions(byte_tokenizer(), ALPACA, 400, least)
    assert len(found) == min(least, 12)
    text = "é" * 16 * 12 + "a"  # two tokens each, of which one character is expected
    whole = training_examples.packed(byte_tokenizer(), text, 32)
    found = training_examples.packed(byte_tokenizer(), text, 32, least)
    assert found == whole[: 2 * least]


def test_alpaca_from_the_data_folder(shared):
    tokenizer = byte_tokenizer()
    found = training_examples.load_examples(
        tokenizer, "alpaca", None, None, str(shared / "data"), 512
    )
    assert len(found) > 1000
    assert all(len(e["input_ids"]) == len(e["labels"]) <= 512 for e in found)


def test_validation_examples_are_set_aside_once_and_by_the_seed():
    examples = [{"input_ids": [i, i], "labels": [-100, i]} for i in range(10)]
    one, two, other = (training_examples.split_validation(examples, 3, s) for s in (1, 1, 2))
    assert one == two != other
    assert (len(one[0]), len(one[1])) == (7, 3)
    assert sorted(e["input_ids"][0] for part in one for e in part) == list(range(10))
    assert training_examples.split_validation(examples, 0, 1)[1] == []
    with pytest.raises(ConfigError, match="validation_size=10, but there are 10 examples"):
        training_examples.split_validation(examples, 10, 1)


def test_a_jsonl_file_of_texts_has_blank_lines_between_its_records(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert training_examples.file_text(str(path)) == "one\n\ntwo"
    path.write_text('{"body": "one"}\n')
    with pytest.raises(ConfigError, match="line 1: the record has no field 'text'; it has: body"):
        training_examples.file_text(str(path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("text", None, None), "give path="),
        (
            ("wikitext2", "tset", None),
            "wikitext2 has no split 'tset'; there are: train",
        ),
        (("pydocs", "train", None), "pydocs has no split 'train'; there are: calibration"),
    ],
)
def test_a_source_that_names_nothing_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        training_examples.check_source(*options)
    training_examples.check_source("wikitext2", "train", None)
    training_examples.check_source("text", None, "mine.txt")
