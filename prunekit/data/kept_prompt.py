"""A prompt under which a model was pruned (pruner=compresso): it stands before every text that the
model reads, be it evaluated or trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from prunekit.data.training_examples import Example


def kept_prompt(model: nn.Module) -> str:
    """The prompt, as pruner=compresso leaves it in the config; empty where there is none."""
    return str(getattr(getattr(model, "config", None), "collaborative_prompt", None) or "")


def prompt_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens of `kept_prompt`."""
    said = kept_prompt(model)
    return list(tokenizer(said, add_special_tokens=False).input_ids) if said else []


def behind(before: list[int], prompts: Sequence[list[int]], begin: int | None) -> list[list[int]]:
    """Each prompt with `before` in front, or after the token `begin` where it starts with that."""
    starts = [int(begin is not None and p[:1] == [begin]) for p in prompts]
    return [[*p[:at], *before, *p[at:]] for at, p in zip(starts, prompts, strict=True)]


def with_prompt(examples: list[Example], model: nn.Module, tokenizer: Any) -> list[Example]:
    """Examples as the model reads them: with its prompt, which is not learnt, where it has one."""
    before = prompt_ids(model, tokenizer)
    if not before:
        return examples
    ids = behind(before, [e["input_ids"] for e in examples], tokenizer.bos_token_id)
    starts = [len(whole) - len(e["input_ids"]) for whole, e in zip(ids, examples, strict=True)]
    return [
        {"input_ids": whole, "labels": [-100] * start + e["labels"]}
        for whole, start, e in zip(ids, starts, examples, strict=True)
    ]
