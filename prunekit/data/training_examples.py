"""Training examples for recoveries: instructions in Alpaca's form, or plain text packed into
blocks.

An example is a dict of `input_ids` and `labels`, lists of equal length; a label of -100 is not
learnt. The first one never is: nothing predicts it, and the Trainer, which divides the loss by the
number of labels, counts it for some architectures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from prunekit.data.datasets import default_split, document, read, records, texts
from prunekit.errors import ConfigError

Source = Literal["alpaca", "pydocs", "wikitext2", "ptb", "c4", "bookcorpus", "dailydialog", "text"]
Example = dict[str, list[int]]

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
CHUNK = 1000


def load(
    tokenizer: Any,
    dataset: Source,
    split: str | None,
    path: str | None,
    data_root: str | None,
    cutoff: int,
) -> list[Example]:
    """Examples of at most `cutoff` tokens from a data set or, with `path`, from a file in the same
    form (`text` = plain text).

    Raises ConfigError where there is nothing to learn from.
    """
    if dataset == "text" and path is None:
        raise ConfigError(
            "dataset=text reads a file of your own: give path= a .jsonl or plain text file"
        )
    part = split or ("train" if dataset == "text" else default_split(dataset, "recover"))
    if dataset == "alpaca":
        found = instructions(
            tokenizer, read(path) if path else records(dataset, part, data_root), cutoff
        )
    else:
        found = packed(
            tokenizer,
            file_text(path) if path else document(texts(dataset, part, data_root)),
            cutoff,
        )
    if not found:
        raise ConfigError(
            f"{path or f'{dataset} ({part})'} gives no example of {cutoff} tokens; lower cutoff "
            "or take more text"
        )
    return found


def file_text(path: str) -> str:
    """All of a plain text file, or the field `text` of each record of a .jsonl file with blank
    lines between them.
    """
    rows = read(path)
    if any("text" not in r for r in rows):
        raise ConfigError(
            f"{path}: every record needs a field 'text'; the first has {', '.join(rows[0])}"
        )
    return ("\n\n" if Path(path).suffix == ".jsonl" else "").join(r["text"] for r in rows)


def instructions(tokenizer: Any, rows: Sequence[dict[str, Any]], cutoff: int) -> list[Example]:
    """Alpaca's prompt and answer, cut at `cutoff`, with the end-of-sequence token if it fits; only
    the answer is learnt.

    A prompt that leaves no room for an answer gives no example (LLM-Pruner keeps it, to no effect
    but a loss of nothing at all).
    """
    found = []
    for start in tqdm(
        range(0, len(rows), CHUNK), desc="tokenizing", leave=False, disable=len(rows) <= CHUNK
    ):
        chunk = [rows[i] for i in range(start, min(start + CHUNK, len(rows)))]
        prompts = [prompt(r) for r in chunk]
        whole = tokenizer(
            [p + r["output"] for p, r in zip(prompts, chunk)], truncation=True, max_length=cutoff
        ).input_ids
        asked = tokenizer(prompts, truncation=True, max_length=cutoff).input_ids
        found += [
            e
            for ids, p in zip(whole, asked)
            if (e := answered(ids, without_end(p, tokenizer), tokenizer, cutoff))
        ]
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


def without_end(ids: list[int], tokenizer: Any) -> int:
    """Length of a prompt whose tokenizer may have closed it with an end-of-sequence token."""
    return len(ids) - (bool(ids) and ids[-1] == tokenizer.eos_token_id)


def answered(ids: list[int], prompt_length: int, tokenizer: Any, cutoff: int) -> Example | None:
    """One example, None if nothing of it is learnt."""
    end = tokenizer.eos_token_id
    if end is not None and ids[-1] != end and len(ids) < cutoff:
        ids = [*ids, end]
    asked = max(prompt_length, 1)
    return {"input_ids": ids, "labels": [-100] * asked + ids[asked:]} if asked < len(ids) else None


def packed(tokenizer: Any, text: str, cutoff: int) -> list[Example]:
    """One text cut into blocks of exactly `cutoff` tokens, tail dropped, all of it learnt."""
    ids = tokenizer(text, verbose=False).input_ids
    blocks = [ids[i : i + cutoff] for i in range(0, len(ids) - cutoff + 1, cutoff)]
    return [{"input_ids": b, "labels": [-100, *b[1:]]} for b in blocks]


def held_out(examples: list[Example], size: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(examples to learn from, `size` others drawn at random). Raises ConfigError if that leaves
    nothing to learn from.
    """
    if size >= len(examples):
        raise ConfigError(
            f"holdout={size}, but there are {len(examples)} examples; possible: 0 to "
            f"{len(examples) - 1}"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in order[size:]], [examples[i] for i in order[:size]]


def collate(batch: list[Example], pad: int = 0, multiple: int = 8) -> dict[str, Tensor]:
    """Examples padded on the left to a common multiple of 8; `(B, T)` each, pads masked and not
    learnt.
    """
    longest = -(-max(len(e["input_ids"]) for e in batch) // multiple) * multiple
    gaps = [longest - len(e["input_ids"]) for e in batch]
    return {
        "input_ids": torch.tensor([[pad] * g + e["input_ids"] for g, e in zip(gaps, batch)]),
        "attention_mask": torch.tensor(
            [[0] * g + [1] * len(e["input_ids"]) for g, e in zip(gaps, batch)]
        ),
        "labels": torch.tensor([[-100] * g + e["labels"] for g, e in zip(gaps, batch)]),
    }
