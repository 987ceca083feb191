"""Generation with a cache against generation without: caches are made from sizes that a plain
forward may never read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import in_short
from prunekit.graph.sample_run import ERRORS, PROMPT

NEW, CLOSE = 3, 1e-3
"""Tokens generated, and how far the logits of each may be apart, relative: chunked and stepwise
recurrences round differently.
"""


def cache_difference(model: nn.Module, inputs: dict[str, Tensor]) -> str | None:
    """None if `NEW` greedy tokens and their logits come out alike with a cache and without, else in
    words what happens instead.
    """
    if not hasattr(model, "generate"):
        return "it has no `generate`"
    prompt = {k: v[:, :PROMPT] for k, v in inputs.items()}
    try:
        with torch.no_grad():
            without, cached = (_generated(model, prompt, use_cache=c) for c in (False, True))
    except ERRORS as e:
        return in_short(e, 100)
    scale = max(1.0, float(without[1].abs().max()))
    if not torch.equal(without[0], cached[0]):
        return "the tokens differ"
    off = float((without[1] - cached[1]).abs().max()) / scale
    return None if off < CLOSE else f"the tokens' logits differ by {off:.1e}"


def _generated(
    model: nn.Module, prompt: dict[str, Tensor], use_cache: bool
) -> tuple[Tensor, Tensor]:
    """The tokens, and the logits of those that are new, `(NEW, 1, V)`."""
    options: dict[str, Any] = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    generate: Any = model.generate
    out = generate(
        **prompt, **options, use_cache=use_cache, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences, torch.stack(out.logits).float()
