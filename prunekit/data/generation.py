"""Sampling rows of one length from a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.errors import ConfigError

NO_TOKEN = 2**31
"""An id beyond every vocabulary."""


class Sampling(NamedTuple):
    """Tokens are drawn for `batch` rows at a time, the logits divided by `temperature`."""

    temperature: float
    seed: int
    batch: int


@contextmanager
def no_generation_config(model: Any) -> Iterator[None]:
    """The library's defaults in place of the model's own generation config, which comes back
    afterwards: `generate` takes from it all that the config it is given leaves open.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def generate_rows(
    model: nn.Module, prompts: Tensor, length: int, how: Sampling, banned: Sequence[int] = ()
) -> Tensor:
    """What the model samples after each prompt `(N, P)`, with a cache, up to `length` tokens.

    Nothing but the temperature shapes the distribution, whatever the model's own generation config
    says; `banned` ids have no share in it. The global generators are left as they were. Returns
    `(N, length)` int64 on the CPU, the prompts in front. Raises ConfigError for a model that cannot
    generate.
    """
    from transformers import GenerationConfig

    generate: Any = getattr(model, "generate", None)
    if generate is None:
        raise ConfigError(f"{type(model).__name__} cannot generate text")
    device = next(model.parameters()).device
    new = length - prompts.shape[1]
    config = GenerationConfig(
        do_sample=True,
        temperature=how.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        min_new_tokens=new,
        suppress_tokens=list(banned) or None,
        pad_token_id=0,
        eos_token_id=NO_TOKEN,  # rows have one length, and a turn's end is a token like others
    )
    rows = []
    with no_generation_config(model), torch.random.fork_rng():
        torch.manual_seed(how.seed)
        for part in tqdm(prompts.split(how.batch), desc="writing text", unit="batch", delay=2):
            part = part.to(device)
            mask = torch.ones_like(part)
            rows.append(generate(part, attention_mask=mask, generation_config=config))
    return torch.cat(rows).cpu()


def generate_text(
    model: nn.Module, tokenizer: Any, samples: int, length: int, how: Sampling
) -> Tensor:
    """`(samples, length)` int64 of the model's own distribution: one random token of the
    vocabulary, and what the model says after it. Special tokens are neither drawn nor said.

    Raises ConfigError for a model that cannot generate.
    """
    special = sorted(set(tokenizer.all_special_ids))
    plain = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(special)))
    generator = torch.Generator().manual_seed(how.seed)
    first = plain[torch.randint(len(plain), (samples, 1), generator=generator)]
    return generate_rows(model, first, length, how, banned=special)


def generate_chats(
    model: nn.Module, tokenizer: Any, samples: int, length: int, how: Sampling
) -> Tensor:
    """`(samples, length)` int64 of dialogues: the chat template up to where a user speaks, and what
    the model says from there, the user's words first (Magpie, arXiv 2406.08464).

    Raises ConfigError for a tokenizer without a chat template, and one whose opening fills
    `length`.
    """
    opening = _user_turn(tokenizer)
    if len(opening) >= length:
        raise ConfigError(
            f"a dialogue begins with {len(opening)} tokens of the chat template: calib.length="
            f"{length} leaves none for what is said"
        )
    prompts = torch.tensor([opening]).repeat(samples, 1)
    return generate_rows(model, prompts, length, how)


def _user_turn(tokenizer: Any) -> list[int]:
    """The chat template's tokens in front of the first words of a user."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            "calib.chat=true: the tokenizer has no chat template; chat=false is plain text"
        )
    words = "prunekit"
    turn = [{"role": "user", "content": words}]
    text: str = tokenizer.apply_chat_template(turn, tokenize=False)
    found: list[int] = tokenizer(text.partition(words)[0], add_special_tokens=False)["input_ids"]
    return found
