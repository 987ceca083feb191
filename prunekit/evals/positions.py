"""Perplexity by how much text stands before a token: a model that loses the use of a long context
loses it at the end of a window only.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from torch import nn

from prunekit.architecture.modes import eval_mode
from prunekit.data.files import DataRoot
from prunekit.data.kept_prompt import prompt_ids
from prunekit.errors import ConfigError
from prunekit.evals.named_texts import Texts, windows_of
from prunekit.evals.windows import exponentiated, token_nll
from prunekit.registry import Component, Length, Positive, evals


def check_positions(_: Component, *, edges: list[int], window: int, **__: Any) -> None:
    """Raises ConfigError for edges that do not cut a window into parts."""
    if sorted({1, *edges, window}) != [1, *edges, window]:
        raise ConfigError(
            f"eval=positions: edges={edges} must increase between 1 and window={window}, exclusive"
        )


@evals.register(context=("window",), check=check_positions)
def positions(
    model: nn.Module,
    tokenizer: Any,
    *,
    texts: Texts,
    window: Length = 2048,
    edges: list[int] = [128, 512, 1024],  # noqa: B006  (read only)
    limit: Positive = 8,
    batch: Positive = 1,
    bos: bool = False,
    data_root: DataRoot = None,
) -> dict[str, float]:
    """Perplexity of tokens with so much text of their window before them:
    `ppl_<text>_<from>to<to>`, the upper end left out, with its `_stderr` over windows.

    Args:
        texts: name -> a data set and its split, or a path.
        window: tokens.
        edges: tokens before a token, where one part ends and the next begins.
        limit: windows of each text, at even distances over it.
        batch: windows at a time.
        bos: one BOS in front of each text.

    Raises ConfigError where a text is not there or shorter than a window.
    """
    found: dict[str, float] = {}
    for name, source in texts.items():
        windows = windows_of(
            source, tokenizer, window=window, limit=limit, bos=bos, data_root=data_root
        )
        with eval_mode(model):
            losses = token_nll(model, windows, batch, name, prompt_ids(model, tokenizer))
        for start, end in pairwise([1, *edges, window]):
            part = losses[:, start - 1 : end - 1].mean(1)  # the first token has no loss
            key, value = f"ppl_{name}_{start}to{end}", exponentiated(float(part.mean()))
            found[key] = value
            if len(part) > 1:
                found[f"{key}_stderr"] = value * float(part.std()) / math.sqrt(len(part))
    return found
