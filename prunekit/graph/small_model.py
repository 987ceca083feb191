"""A small version of a model with random weights large enough that every unit matters: where proofs
are made.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from prunekit.graph.labels import tensors
from prunekit.graph.skeleton import ERRORS, clone, inputs_for, logits_of, skeleton
from prunekit.graph.slicing import standard

SMALL = 4_000_000
"""Parameters up to which a skeleton is its own small version."""
HIDDEN, INNER, HEADS, KV, HEAD = 48, 60, 6, 3, 8
"""Sizes of a twin, all different so that one size cannot be taken for another."""


def small_version(model: nn.Module) -> nn.Module:
    """Two blocks of each kind with random weights: of the model itself if those are few, else of
    one built from its shrunken config.

    Where no config shrinks (foreign modules, sizes that a class ties together in its own way) the
    real widths are used.
    """
    own = skeleton(model, each=2)[0]
    if count(own) > SMALL and hasattr(model, "config"):
        for twin in twins(model):
            try:
                small = skeleton(twin, each=2)[0]
                small = randomised(small)
                with torch.no_grad():
                    if (
                        count(small) <= SMALL
                        and torch.isfinite(logits_of(small(**inputs_for(small)))).all()
                    ):
                        return small
            except ERRORS:
                continue
    return randomised(own)


def twins(model: nn.Module) -> Iterator[nn.Module]:
    """Models of the same class on the meta device, from the config with its sizes shrunk: boldly
    first, then only what must be.
    """
    for bold in (True, False):
        config = copy.deepcopy(model.config)
        shrink_config(config, bold)
        try:
            with torch.device("meta"):
                twin = type(model)(config)
        except ERRORS:
            continue
        yield twin


def shrink_config(config: Any, bold: bool) -> None:
    """Sizes under transformers' standard names get small values, others that equal them or
    multiples of them follow; experts become few.
    """
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            shrink_config(value, bold)
    hidden, heads = standard(config, "hidden_size"), standard(config, "num_attention_heads")
    if not hidden or not heads:
        return
    kv, inner = standard(config, "num_key_value_heads"), standard(config, "intermediate_size")
    head = standard(config, "head_dim") or hidden // heads
    small_kv = KV if kv and kv < heads else HEADS
    small_kv = 1 if kv == 1 else small_kv
    known = {
        hidden: HIDDEN,
        inner: INNER,
        head: HEAD,
        heads * head: HEADS * HEAD,
        4 * hidden: 4 * HIDDEN,
        3 * hidden: 3 * HIDDEN,
    }
    named = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": small_kv,
        "head_dim": HEAD,
    }
    changes = {}
    for attr, value in vars(config).items():
        if (
            type(value) is not int
            or attr.endswith("token_id")
            or "layer" in attr
            or attr.startswith("_")
        ):
            continue
        if "expert" in attr and "per_tok" not in attr and "size" not in attr and value > 8:
            changes[attr] = 8
        elif "vocab" in attr:
            changes[attr] = min(value, 160)
        elif bold and value >= 32 and value in known:
            changes[attr] = known[value]
        elif (
            bold
            and value >= 128
            and any(part in attr for part in ("size", "dim", "rank", "width", "ffn", "inner"))
        ):
            changes[attr] = max(8, value * HIDDEN // hidden // 4 * 4)
    for attr, value in named.items():
        name = getattr(config, "attribute_map", {}).get(attr, attr)
        if standard(config, attr):
            changes[name] = value
    for attr, value in changes.items():
        setattr(config, attr, value)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A float32 copy with weights that give activations of order one; vectors are only jittered, so
    that gains stay gains.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, nn.Parameter):
            return t.detach().clone()
        t = t.detach().float()
        if t.dim() <= 1:
            return t + torch.randn(t.shape, generator=g) * 0.1
        fan = t.shape[-1] if t.dim() == 2 else max(t.shape[-2:])
        return torch.randn(t.shape, generator=g) * fan**-0.5

    return clone(model, draw).float()


def count(model: nn.Module) -> int:
    return sum(t.numel() for _, t in tensors(model) if isinstance(t, nn.Parameter))
