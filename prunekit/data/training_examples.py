"""Training examples for recoveries: instructions in Alpaca's form, or plain text packed into
blocks.

An example is a dict of `input_ids` and `labels`, lists of equal length; a label of -100 is not
learnt. The first one never is: nothing predicts it, and the Trainer, which divides the loss by the
number of labels, counts it for some architectures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from prunekit.data.datasets import (
    FIELDS,
    Dataset,
    check_split,
    default_split,
    document,
    records,
    texts,
)
from prunekit.data.files import is_records, read
from prunekit.errors import ConfigError

Corpus = Literal[Dataset, "text"]
"""What can be learnt from: a data set, or with `text` a file of the user's own."""
Example = dict[str, list[int]]

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
CHUNK = 1000
CHARACTERS = 8
"""More than a token has, on average, in nearly every text."""


def check_source(dataset: Corpus, split: str | None, path: str | None) -> None:
    """Raises ConfigError where the three options do not name anything to learn from; reads
    nothing.
    """
    if dataset == "text" and path is None:
        raise ConfigError(
            "dataset=text reads a file of your own: give path= a .jsonl or plain text file"
        )
    if dataset != "text" and path is None and split is not None:
        check_split(dataset, split)


def load_examples(
    tokenizer: Any,
    dataset: Corpus,
    split: str | None,
    path: str | None,
    data_root: str | None,
    max_length: int,
    least: int | None = None,
) -> list[Example]:
    """Examples of at most `max_length` tokens from a data set or, with `path`, from a file in the
    same form (`text` = plain text): all of them, or with `least`, which says that a longer text
    need not be tokenized to its end, at least so many if there are.

    Raises ConfigError where there is nothing to learn from.
    """
    check_source(dataset, split, path)
    part = split or ("" if dataset == "text" else default_split(dataset, "recover"))
    if dataset == "alpaca":
        rows = read(path, **FIELDS["alpaca"]) if path else records(dataset, part, data_root)
        found = instructions(tokenizer, rows, max_length, least)
    else:
        text = file_text(path) if path else document(texts(dataset, part, data_root))
        found = packed(tokenizer, text, max_length, least)
    if not found:
        remedy = "lower max_length or take more text"
        if dataset == "alpaca":
            remedy = "raise max_length: prompts alone have more"
        raise ConfigError(
            f"{path or f'{dataset} ({part})'} gives no example of {max_length} tokens; {remedy}"
        )
    return found


def first_examples(
    tokenizer: Any,
    length: int,
    least: int,
    *,
    dataset: Corpus,
    split: str | None,
    path: str | None,
    data_root: str | None,
    **_: Any,
) -> list[Example]:
    """Of the text that a recovery's options name, at least so many examples if there are. It is
    read whole and tokenized as far as that needs. Raises ConfigError as `load_examples` does.
    """
    return load_examples(tokenizer, dataset, split, path, data_root, length, least=least)


def check_training_text(
    tokenizer: Any, *, max_length: int, validation_size: int = 0, seed: int = 0, **text: Any
) -> None:
    """Raises ConfigError where a text cannot be read, holds nothing, or too little to set
    `validation_size` examples aside.
    """
    found = first_examples(tokenizer, max_length, validation_size + 1, **text)
    split_validation(found, validation_size, seed)


def file_text(path: str) -> str:
    """All of a plain text file, or the field `text` of each record of a .jsonl file with blank
    lines between them.
    """
    rows = read(path)
    glue = "\n\n" if is_records(path) else ""
    return glue.join(r["text"] for r in rows)


def instructions(
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    max_length: int,
    least: int | None = None,
) -> list[Example]:
    """Alpaca's prompt and answer, cut at `max_length`, with the end-of-sequence token if it fits;
    only the answer is learnt. `least`: as `load_examples` says.

    A prompt that leaves no room for an answer gives no example (LLM-Pruner keeps it, to no effect
    but a loss of nothing at all).
    """
    found = []
    bar = tqdm(total=len(rows), desc="tokenizing", unit="example", leave=False)
    for start in range(0, len(rows), CHUNK):
        chunk = [rows[i] for i in range(start, min(start + CHUNK, len(rows)))]
        prompts = [prompt(r) for r in chunk]
        whole = [p + r["output"] for p, r in zip(prompts, chunk, strict=True)]
        # Cut here: some tokenizers cut the beginning off.
        prompt_ids, whole_ids = (
            [ids[:max_length] for ids in tokenizer(x, verbose=False).input_ids]
            for x in (prompts, whole)
        )
        for asked, ids in zip(prompt_ids, whole_ids, strict=True):
            example = answered(ids, length_without_end(asked, tokenizer), tokenizer, max_length)
            found += [example] if example else []
        bar.update(len(chunk))
        if least is not None and len(found) >= least:
            break
    bar.close()
    return found


def prompt(row: dict[str, Any]) -> str:
    """The Alpaca template around one record. Raises ConfigError naming the fields that it needs."""
    if not {"instruction", "output"} <= row.keys():
        raise ConfigError(
            "an Alpaca record has the fields instruction, input (may be empty) and output; this "
            f"one has {', '.join(row)}"
        )
    return (WITH_INPUT if row.get("input") else WITHOUT_INPUT).format(
        instruction=row["instruction"], input=row.get("input")
    )


def length_without_end(ids: list[int], tokenizer: Any) -> int:
    """Length of a prompt whose tokenizer may have closed it with an end-of-sequence token."""
    return len(ids) - (bool(ids) and ids[-1] == tokenizer.eos_token_id)


def answered(ids: list[int], prompt_length: int, tokenizer: Any, max_length: int) -> Example | None:
    """One example, None if nothing of it is learnt."""
    end = tokenizer.eos_token_id
    if end is not None and ids[-1] != end and len(ids) < max_length:
        ids = [*ids, end]
    asked = max(prompt_length, 1)
    return {"input_ids": ids, "labels": [-100] * asked + ids[asked:]} if asked < len(ids) else None


def packed(tokenizer: Any, text: str, max_length: int, least: int | None = None) -> list[Example]:
    """One text cut into blocks of exactly `max_length` tokens, tail dropped, all of it learnt.
    `least`: as `load_examples` says.
    """
    if least is not None and len(text) > (start := CHARACTERS * least * max_length):
        found = packed(tokenizer, text[:start], max_length)
        if len(found) >= least:
            return found
    ids = tokenizer(text, verbose=False).input_ids
    blocks = [ids[i : i + max_length] for i in range(0, len(ids) - max_length + 1, max_length)]
    return [all_learnt(block) for block in blocks]


def all_learnt(ids: list[int]) -> Example:
    """Text without a prompt: all but the first token is learnt."""
    return {"input_ids": ids, "labels": [-100, *ids[1:]]}


def split_validation(
    examples: list[Example], size: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """(examples to learn from, `size` others drawn at random). Raises ConfigError if that leaves
    nothing to learn from.
    """
    if size >= len(examples):
        raise ConfigError(
            f"validation_size={size}, but there are {len(examples)} examples; possible: 0 to "
            f"{len(examples) - 1}"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in order[size:]], [examples[i] for i in order[:size]]


def collate(batch: list[Example], pad: int = 0, multiple: int = 8) -> dict[str, Tensor]:
    """Examples padded on the right to a common multiple of 8; `(B, T)` each, pads masked and not
    learnt.

    On the left they would move the positions that some models count from the first token (GPT-2),
    and be read by recurrent ones: an example would depend on those beside it.
    """
    longest = -(-max(len(e["input_ids"]) for e in batch) // multiple) * multiple
    rows = [(longest - len(e["input_ids"]), e) for e in batch]
    ids = [e["input_ids"] + [pad] * gap for gap, e in rows]
    mask = [[1] * len(e["input_ids"]) + [0] * gap for gap, e in rows]
    labels = [e["labels"] + [-100] * gap for gap, e in rows]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }
