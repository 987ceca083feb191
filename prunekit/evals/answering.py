"""What a model answers to prompts of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.architecture.modes import eval_mode
from prunekit.data.generation import no_generation_config
from prunekit.data.kept_prompt import behind, prompt_ids
from prunekit.errors import ConfigError

END = -1
"""In place of what would come after an answer's last token."""


def as_prompts(tokenizer: Any, requests: Sequence[str], chat: bool) -> list[list[int]]:
    """Token ids of each request: behind the chat template up to where the model speaks, or as plain
    text. Raises ConfigError where there is no template.
    """
    if not chat:
        return [tokenizer(text).input_ids for text in requests]
    check_chat(tokenizer, chat=chat)
    turns = [[{"role": "user", "content": text}] for text in requests]
    write = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    return [tokenizer(write(turn), add_special_tokens=False).input_ids for turn in turns]


def check_chat(tokenizer: Any, *, chat: bool, **_: Any) -> None:
    """Raises ConfigError where requests should be in a chat template, and there is none."""
    if chat and getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError("chat=true: the tokenizer has no chat template; chat=false is plain text")


def stops(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's generation config."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return sorted({token for token in found if token is not None})


@torch.no_grad()
def answered(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    new_tokens: int,
    batch: int,
    temperature: float | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Ids `(N, new_tokens)` int64 with END behind each answer, without the prompt and the token
    that ended it, and whether one did `(N,)`, 0 or 1.

    A prompt that a pruner left with the model stands before each of `prompts`, behind the token
    that begins a text. The most likely token each time or, with a `temperature`, one that is drawn;
    nothing else shapes the distribution, whatever the model's own generation config says. Prompts
    of a batch are padded in front. The global generators are left as they were. Raises ConfigError
    for a model that cannot generate.
    """
    from transformers import GenerationConfig

    generate: Any = getattr(model, "generate", None)
    if generate is None:
        raise ConfigError(f"{type(model).__name__} cannot generate text")
    ends = stops(model, tokenizer)
    prompts = behind(prompt_ids(model, tokenizer), prompts, tokenizer.bos_token_id)
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    pad = ends[0] if ends else 0
    how = GenerationConfig(
        max_new_tokens=new_tokens, eos_token_id=ends or None, pad_token_id=pad, **drawn
    )
    device = next(model.parameters()).device
    rows, stopped = [], []
    with eval_mode(model), no_generation_config(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        starts = range(0, len(prompts), batch)
        for start in tqdm(starts, desc="answering", unit="batch", leave=False):
            part = prompts[start : start + batch]
            longest = max(map(len, part))
            ids = torch.tensor([[pad] * (longest - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part])
            said = generate(ids.to(device), attention_mask=mask.to(device), generation_config=how)
            found, ended = cut_at_end(said[:, longest:].cpu(), ends, new_tokens)
            rows.append(found)
            stopped.append(ended)
    return torch.cat(rows), torch.cat(stopped)


def cut_at_end(said: Tensor, ends: list[int], length: int) -> tuple[Tensor, Tensor]:
    """Of `said (N, T)` what stands before the first ending token, filled up with END to
    `(N, length)`; and whether there was one `(N,)`.
    """
    over = torch.isin(said, torch.tensor(ends, dtype=said.dtype)).cumsum(1) > 0
    found = torch.full((len(said), length), END)
    found[:, : said.shape[1]] = said.masked_fill(over, END)
    return found, over.any(1).to(torch.uint8)


def as_lists(ids: Tensor) -> list[list[int]]:
    """Each answer's own tokens."""
    return [row[row != END].tolist() for row in ids]


def as_texts(tokenizer: Any, ids: Tensor) -> list[str]:
    """Each answer as text, without special tokens."""
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in as_lists(ids)]
