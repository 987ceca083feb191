"""How long a request takes: reading the prompt (prefill) and writing each further token (decode),
apart.
"""

from __future__ import annotations

from statistics import median, quantiles
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from tqdm import tqdm

from prunekit.architecture.modes import eval_mode
from prunekit.architecture.timing import prompt_ids, request, waiter
from prunekit.registry import Natural, Positive, evals

Repeats = Annotated[int, Field(ge=2)]
"""At least two, for a spread to exist."""


@evals.register(cached=False, context=("prompt", "new_tokens"))
def latency(
    model: nn.Module,
    tokenizer: Any,
    *,
    batch: Positive = 1,
    prompt: Positive = 64,
    new_tokens: Positive = 32,
    repeats: Repeats = 5,
    warmup: Natural = 1,
) -> dict[str, float]:
    """Milliseconds to read a prompt and per token written, tokens per second; medians over
    `repeats`, spread = interquartile range.

    A request is `batch` x `prompt` ids in one pass, whose logits give the first new token, then
    `new_tokens` passes of one token with the cache, greedy. The prompt is all ones, so the work is
    the same every time. `latency_ms` is the whole request, `tokens_per_s` counts `batch *
    new_tokens` over decode alone. A model that returns no cache reads the whole sequence anew for
    each token, as it would have to in use. Every device of the model is waited for around each
    part. `warmup` whole requests go unmeasured.
    """
    ids, wait = prompt_ids(model, batch, prompt), waiter(model)
    times = []
    with eval_mode(model), torch.no_grad():
        for i in tqdm(range(warmup + repeats), desc="latency", unit="request", leave=False):
            measured = request(model, ids, new_tokens, wait)
            if i >= warmup:
                times.append(measured)
    prefill, decode = ([1000 * t[i] for t in times] for i in (0, 1))
    per_token = [d / new_tokens for d in decode]
    return {
        "prefill_ms": median(prefill),
        "prefill_ms_spread": _spread(prefill),
        "decode_ms_per_token": median(per_token),
        "decode_ms_per_token_spread": _spread(per_token),
        "latency_ms": median(a + b for a, b in zip(prefill, decode)),
        "tokens_per_s": 1000 * batch / median(per_token),
    }


def _spread(values: list[float]) -> float:
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low
