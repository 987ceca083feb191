"""A small version of a model with random weights large enough that every unit matters: where proofs
are made.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.graph.labels import tensors
from prunekit.graph.module_sizes import standard
from prunekit.graph.sample_run import ERRORS, inputs_for, logits_of
from prunekit.graph.skeleton import clone, skeleton

SMALL = 4_000_000
"""Parameters up to which a skeleton is its own small version."""
HIDDEN, INNER, HEADS, KV, HEAD = 48, 60, 6, 3, 8
"""Sizes of a small model, all different so that one size cannot be taken for another."""


def small_version(model: nn.Module) -> nn.Module:
    """Two blocks of each kind with random weights: of the model itself if those are few, else of
    one built from its shrunken config.

    Where no config shrinks (foreign modules, sizes that a class ties together in its own way) the
    real widths are used.
    """
    own = skeleton(model, each=2)[0]
    if count(own) > SMALL and hasattr(model, "config"):
        for shrunk in shrunk_models(model):
            try:
                small = randomised(skeleton(shrunk, each=2)[0])
                with torch.no_grad():
                    logits = logits_of(small(**inputs_for(small)))
            except ERRORS:
                continue
            if count(small) <= SMALL and torch.isfinite(logits).all():
                return small
    return randomised(own)


def shrunk_models(model: nn.Module) -> Iterator[nn.Module]:
    """Models of the same class on the meta device, from the config with its sizes shrunk: all of
    them first, then only numbers of experts and the standard sizes.
    """
    for everything in (True, False):
        config = copy.deepcopy(model.config)
        shrink_config(config, everything)
        build: Any = type(model)
        try:
            with torch.device("meta"):
                shrunk = build(config)
        except ERRORS:
            continue
        yield shrunk


def shrink_config(config: Any, everything: bool) -> None:
    """Sizes under transformers' standard names get small values, with `everything` others that
    equal them or multiples of them follow; experts become few.
    """
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            shrink_config(value, everything)
    hidden, heads = standard(config, "hidden_size"), standard(config, "num_attention_heads")
    if not hidden or not heads:
        return
    kv = standard(config, "num_key_value_heads")
    head = standard(config, "head_dim") or hidden // heads
    following = {
        hidden: HIDDEN,
        standard(config, "intermediate_size") or 0: INNER,
        head: HEAD,
        heads * head: HEADS * HEAD,
        4 * hidden: 4 * HIDDEN,
        3 * hidden: 3 * HIDDEN,
    }
    changes = {}
    for attr, value in vars(config).items():
        fixed = attr.endswith("token_id") or "layer" in attr or attr.startswith("_")
        if type(value) is not int or fixed:
            continue
        new = _few(attr, value)
        if new is None:
            new = _following(attr, value, following, hidden) if everything else value
        if new != value:
            changes[attr] = new
    for attr, value in {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1 if kv == 1 else KV if kv and kv < heads else HEADS,
        "head_dim": HEAD,
    }.items():
        if standard(config, attr):
            changes[getattr(config, "attribute_map", {}).get(attr, attr)] = value
    for attr, value in changes.items():
        setattr(config, attr, value)


def _few(attr: str, value: int) -> int | None:
    """Fewer experts, a smaller vocabulary; None for other numbers."""
    if "expert" in attr and "per_tok" not in attr and "size" not in attr and value > 8:
        return 8
    return min(value, 160) if "vocab" in attr else None


def _following(attr: str, value: int, following: dict[int, int], hidden: int) -> int:
    """The small value of a number that equals one of the standard sizes, or is a size by its
    name.
    """
    if value >= 32 and value in following:
        return following[value]
    size = any(part in attr for part in ("size", "dim", "rank", "width", "ffn", "inner"))
    return max(8, value * HIDDEN // hidden // 4 * 4) if value >= 128 and size else value


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A float32 copy with weights that give activations of order one; vectors are only jittered, so
    that gains stay gains.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            return t.detach().clone()
        t = t.detach().float()
        if t.dim() <= 1:
            return t + torch.randn(t.shape, generator=g) * 0.1
        fan = t.shape[-1] if t.dim() == 2 else max(t.shape[-2:])
        scale: float = fan**-0.5
        return torch.randn(t.shape, generator=g) * scale

    return clone(model, draw).float()


def count(model: nn.Module) -> int:
    return sum(t.numel() for _, t in tensors(model) if isinstance(t, nn.Parameter))
