"""The memory that scoring and recovery will need at most, estimated from shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prunekit.activations.runs import FORWARD_TOKENS
from prunekit.architecture.blocks import block_modules, linear_names
from prunekit.architecture.linear import is_linear, weight_of
from prunekit.architecture.streaming import will_stream
from prunekit.runner import preflight
from prunekit.scoring.gradients import TOKENS as BACKWARD_TOKENS

LIBRARIES = 600 * 2**20
"""Resident memory of a process that has imported torch and transformers and used them once. The
peaks of a run on a CPU have it; a GPU's allocator does not count it.
"""
ADAM = 16
"""Bytes for each trained parameter in float32: itself, its gradient, Adam's two moments."""


def scoring_peak(model: nn.Module, parts: preflight.Components, cfg: dict[str, Any]) -> int | None:
    """Weights, and what the criterion adds: nothing, one layer's activations, or what a backward
    keeps and the largest gradient; where blocks come in turn, what is found of one besides. None
    without a criterion, unless they do.
    """
    away = cfg["model"].get("weights", "memory") != "memory"
    if parts.criterion is None and not away:
        return None
    needs = (parts.criterion or parts.pruner).meta.get("needs", "-")
    weights = resident(model, cfg)
    standing = weights + libraries(cfg) + (statistics(model, parts) if away else 0)
    if needs == "-":
        return standing
    wide = cfg["model"].get("compute") == "float32"
    item = 4 if wide else next(model.parameters()).element_size()
    vocabulary, hidden = model.get_input_embeddings().weight.shape  # type: ignore[operator]
    most = cfg["calib"].get("samples", 10) * cfg["calib"].get("length", 64)
    if needs == "data":
        tokens = min(most, FORWARD_TOKENS)
        return int(standing + tokens * widest(model) * item)
    asked = (parts.criterion or parts.pruner).options
    samples = asked.get("batch")
    tokens = min(most, samples * cfg["calib"].get("length", 64) if samples else BACKWARD_TOKENS)
    if "by_block" in asked and (away if asked["by_block"] is None else asked["by_block"]):
        at_work = by_block(model, asked, tokens, most, item, host=bool(libraries(cfg)))
        return int(standing + at_work)
    # A backward keeps all products, and of each block what enters it and what attention found.
    kept = tokens * (outputs(model) + 2 * hidden * len(block_modules(model))) * item
    size = next(model.parameters()).element_size()
    largest = max(p.numel() for p in model.parameters())
    # Gradients of several backwards add up, as large as the weights.
    gradients = weight_bytes(model) if tokens < most else largest * size
    return int(standing + kept + tokens * vocabulary * (item + 4) + gradients)


def by_block(
    model: nn.Module, options: dict[str, Any], tokens: int, most: int, item: int, host: bool
) -> int:
    """What gradients block by block add to the weights: the inputs of all blocks for `most` tokens,
    unless they wait in files or beside a device (without `host`), and the larger of what the loss
    and one block need for `tokens`.
    """
    vocabulary, hidden = model.get_input_embeddings().weight.shape  # type: ignore[operator]
    blocks = block_modules(model)
    size = next(model.parameters()).element_size()
    number = {"memory": item, "bfloat16": 2 if host else 0, "disk": 0}[options["store"]]
    waiting: int = (len(blocks) + 1) * most * hidden * number
    gradients = max(sum(p.numel() for p in b.parameters()) for b in blocks) * size
    at_work = tokens * (widest(model) + 2 * hidden) * item + gradients
    return int(waiting + max(at_work, tokens * vocabulary * (item + 4)))


def statistics(model: nn.Module, parts: preflight.Components) -> int:
    """Bytes of what a pruner finds of the largest block, in float32: a score for each element where
    single weights compete; the gram matrices of all inputs, and the largest one's inverse and its
    factor, where it solves without a criterion; little else.
    """
    blocks = block_modules(model)
    if parts.criterion:
        single = parts.pruner.meta.get("kinds") == ("weights",)
        return 4 * max(sum(p.numel() for p in b.parameters()) for b in blocks) if single else 0
    inputs = [[weight_of(m).shape[1] for m in b.modules() if is_linear(m)] for b in blocks]
    return 4 * max(sum(n**2 for n in row) + 2 * max(row, default=0) ** 2 for row in inputs)


def recovery_peak(model: nn.Module, cfg: dict[str, Any]) -> int:
    """Pruned weights, adapters with their optimizer, activations of one micro-batch, and its logits
    in float32 twice.
    """
    options = cfg["recovery"]
    weights = weight_bytes(model)
    rank = options.get("r", 0)
    adapted = linear_names(model, options.get("targets")) if rank else ()
    trained = (
        sum(rank * sum(weight_of(model.get_submodule(n)).shape) for n in adapted)
        if rank
        else sum(p.numel() for p in model.parameters())
    )
    tokens = options.get("micro_batch", 1) * options.get("max_length", 256)
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[operator,union-attr]
    # Autograd keeps the input and the output of every product, and about as much again for norms,
    # rotations and activations.
    activations = 3 * tokens * outputs(model) * next(model.parameters()).element_size()
    logits = 2 * tokens * vocabulary * 4
    return int(weights + trained * ADAM + activations + logits + libraries(cfg))


def libraries(cfg: dict[str, Any]) -> int:
    """Bytes that a run has before it loads a model, as its peaks are counted."""
    device = cfg["model"].get("device")
    on_cpu = device == "cpu" if device else not torch.cuda.is_available()
    return LIBRARIES if on_cpu and not will_stream(cfg["model"]) else 0


def resident(model: nn.Module, cfg: dict[str, Any]) -> int:
    """Bytes of weights that are in the memory of the device at once: all, or with
    model.weights=disk the largest block or embedding, and with host that and the next one; and with
    model.compute=float32 a block or embedding converted.
    """
    parts = [model.get_input_embeddings(), *block_modules(model)]  # type: ignore[operator]
    largest = max(sum(p.numel() for p in m.parameters()) for m in parts)
    size = next(model.parameters()).element_size()
    at_once = {"memory": 0, "disk": 1, "host": 2}[cfg["model"].get("weights") or "memory"]
    stored: int = at_once * largest * size or weight_bytes(model)
    return stored + (4 * largest if cfg["model"].get("compute") == "float32" else 0)


def outputs(model: nn.Module) -> int:
    """Channels that all linear layers of the blocks put out for one token."""
    return sum(outputs_by_block(model))


def widest(model: nn.Module) -> int:
    """Channels that the linear layers of the widest block put out for one token."""
    return max(outputs_by_block(model))


def outputs_by_block(model: nn.Module) -> list[int]:
    """Channels that the linear layers of each block put out for one token."""
    return [
        sum(weight_of(m).shape[0] for m in block.modules() if is_linear(m))
        for block in block_modules(model)
    ]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
