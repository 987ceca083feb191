"""The time of a request: reading a prompt in one pass, then one token at a time with the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.architecture.streaming import device_of


def wait_for(devices: Iterable[torch.device]) -> None:
    """Returns when everything sent to these devices is done."""
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)


def waiter(model: nn.Module) -> Callable[[], None]:
    """What waits for every device that holds some of the model."""
    return partial(wait_for, {device_of(model), *(p.device for p in model.parameters())})


def prompt_ids(model: nn.Module, batch: int, prompt: int) -> Tensor:
    """(batch, prompt) ids, all ones, so that the work is the same every time."""
    return torch.ones(batch, prompt, dtype=torch.long, device=device_of(model))


def request(
    model: nn.Module, ids: Tensor, new_tokens: int, wait: Callable[[], None]
) -> tuple[float, float]:
    """Seconds of prefill, seconds of decode, greedy. A model that returns no cache reads the whole
    sequence anew for each token.
    """
    wait()
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True)
    wait()
    middle = time.perf_counter()
    for _ in range(new_tokens):
        chosen = out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, chosen], dim=1)
        cache = getattr(out, "past_key_values", None)
        out = model(
            input_ids=ids if cache is None else chosen, past_key_values=cache, use_cache=True
        )
    wait()
    return middle - start, time.perf_counter() - middle
