"""Windows of a text, and what a model loses on each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.errors import ConfigError


def token_ids(text: str, tokenizer: Any, bos: bool | None) -> Tensor:
    """The whole text tokenized once, with what the tokenizer puts around a text (None), one BOS in
    front (True) or nothing (False). Raises ConfigError where the tokenizer has no BOS.
    """
    ids = tokenizer(text, add_special_tokens=bos is None).input_ids
    if bos:
        if tokenizer.bos_token_id is None:
            raise ConfigError("bos=true, but the tokenizer has no BOS token; use bos=null or false")
        ids = [tokenizer.bos_token_id, *ids]
    return torch.tensor(ids)


def cut(
    ids: Tensor,
    window: int,
    *,
    block: int | None = None,
    every: int = 1,
    limit: int | None = None,
) -> Tensor:
    """Non-overlapping windows `(N, window)` of a token stream, the tail dropped.

    Args:
        block: tokens of a block, of which every `every`-th is read; None is a window.
        limit: the first so many windows.

    Raises ConfigError for blocks that windows do not fill, and for less text than a block.
    """
    block = block or window
    check_block(window, block)
    blocks = ids[: len(ids) // block * block].view(-1, block)[::every]
    windows = blocks.reshape(-1, window)[:limit]
    if not len(windows):
        raise ConfigError(f"the text has {len(ids)} tokens, not one block of {block}")
    return windows


def check_block(window: int, block: int) -> None:
    """Raises ConfigError for blocks that windows do not fill."""
    if block % window:
        raise ConfigError(f"block={block} is no multiple of window={window}")


@torch.inference_mode()
def token_nll(
    model: nn.Module, windows: Tensor, batch: int, name: str, prompt: Sequence[int] = ()
) -> Tensor:
    """Negative log-likelihood of every token but the first of each window, `(N, T - 1)` float64 on
    the CPU; the logarithm is taken in float32.

    Args:
        name: of the text, on the progress bar.
        prompt: tokens before each window, of which none is predicted.
    """
    device = next(model.parameters()).device
    found = []
    with tqdm(total=len(windows), desc=name, unit="window", leave=False) as bar:
        for rows in windows.split(batch):
            rows = rows.to(device)
            before = torch.tensor([*prompt], dtype=rows.dtype, device=device).expand(len(rows), -1)
            whole = torch.cat([before, rows], 1)
            logits = model(input_ids=whole, use_cache=False).logits[:, len(prompt) :]
            # One window at a time: float32 logits of a batch can be gigabytes.
            for row, scores in zip(rows, logits, strict=True):
                loss = nn.functional.cross_entropy(
                    scores[:-1].float(), row[1:].to(scores.device), reduction="none"
                )
                found.append(loss.double().cpu())
            bar.update(len(rows))
    return torch.stack(found)


def window_nll(
    model: nn.Module, windows: Tensor, batch: int, name: str, prompt: Sequence[int] = ()
) -> Tensor:
    """Mean negative log-likelihood of each window's predicted tokens. `(N,)` float64."""
    return token_nll(model, windows, batch, name, prompt).mean(1)


def exponentiated(nll: float) -> float:
    """The perplexity of a mean negative log-likelihood, infinite where it is no float64, about 709
    nats: there `math.exp` raises, and a number that is not finite has its own report.
    """
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
