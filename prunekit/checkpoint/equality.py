"""A few tokens through a model and through the copy that a loader would make of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekit.architecture.modes import eval_mode
from prunekit.architecture.offload import input_device, placed_like
from prunekit.checkpoint.class_sizes import REFUSALS
from prunekit.errors import ConfigError


def logit_gap(model: Any, copy: nn.Module) -> float:
    """Largest difference between the logits of two models on eight tokens; 0 on the meta device,
    infinite where only `copy` cannot run.

    Where accelerate spread `model` over devices, host memory or disk, both run as it placed them.
    Raises ConfigError where the model itself cannot run: expert widths, for one, that its matrix
    kernel does not take.
    """
    device = input_device(model)
    if device is None:
        return 0.0
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(8, device=device) * 7919 % vocabulary)[None]
    try:
        ours = _logits(model, ids)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            "the model cannot run, so its checkpoint cannot be checked (check=False saves it all "
            f"the same): {error}"
        ) from error
    try:
        with placed_like(model, copy):
            theirs = _logits(copy, ids)
    except REFUSALS:
        return float("inf")
    return (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with eval_mode(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float().nan_to_num()


@torch.no_grad()
def cache_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(heads, head size) of each layer's keys, seen by running a few tokens; [] where layers keep
    something else, on meta, or where it fails.
    """
    device = input_device(model)
    if device is None:
        return []
    try:
        with eval_mode(model):
            output = model(input_ids=torch.arange(4, device=device)[None], use_cache=True)
    except REFUSALS:  # where it cannot run at all `logit_gap` says why
        return []
    layers = getattr(getattr(output, "past_key_values", None), "layers", [])
    keys: list[Any] = [getattr(layer, "keys", None) for layer in layers]
    if not all(isinstance(k, Tensor) and k.dim() == 4 for k in keys):
        return []
    return [(k.shape[1], k.shape[3]) for k in keys]
