"""At what depth tokens leave a model with early exit (AdaInfer, arXiv 2403.02181), counted over
forwards, and at what depth an oracle would let them go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.architecture.blocks import block_modules
from prunekit.architecture.linear import is_linear


def gate_of(model: nn.Module) -> Any:
    """The module that lets tokens leave, None where there is none. By its class's name: a model
    loaded with trust_remote_code has classes of its own copy of the file.
    """
    return next((m for m in model.modules() if type(m).__name__ == "EarlyExit"), None)


@contextmanager
def leaving(gate: Any) -> Iterator[None]:
    """Inside, tokens leave, and the gate's counts begin anew."""
    before = gate.progress.never
    gate.progress.clear()
    gate.progress.never = False
    try:
        yield
    finally:
        gate.progress.never = before


@contextmanager
def all_blocks(model: nn.Module, gate: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, tokens pass all blocks. Yields a list that gets, for each forward, the most likely
    tokens (N, T), and after how many blocks each position has its own for the first time, among
    those at which it may leave; (N, T).
    """
    found: list[tuple[Tensor, Tensor]] = []
    seen: list[Tensor] = []
    depths = torch.tensor([*gate.tests, len(gate.blocks)])

    def see(module: nn.Module, args: Any, out: Any) -> None:
        y = out if isinstance(out, Tensor) else out[0]
        seen.append(gate.predictions(y.flatten(0, -2))[1].view(y.shape[:-1]))

    def compare(module: nn.Module, args: Any, out: Any) -> None:
        want = out.logits.argmax(-1)
        agrees = [*(s.to(want.device) == want for s in seen), torch.ones_like(want).bool()]
        found.append((want, depths.to(want.device)[torch.stack(agrees, -1).int().argmax(-1)]))
        seen.clear()

    hooks = [gate.blocks[depth - 1].register_forward_hook(see) for depth in gate.tests]
    hooks.append(model.register_forward_hook(compare))
    before, gate.progress.never = gate.progress.never, True
    try:
        yield found
    finally:
        gate.progress.never = before
        for hook in hooks:
            hook.remove()


def saved(model: nn.Module, gate: Any) -> dict[str, float]:
    """What the gate's counts come to: `depth` (mean number of blocks), `blocks_saved` (the paper's
    share), `compute_saved` (share of the multiplications with weights; each classification costs
    those of the output matrix, so it may be negative; filling a cache is not counted).
    """
    blocks = block_modules(model)
    if gate is None:
        return {"depth": float(len(blocks)), "blocks_saved": 0.0, "compute_saved": 0.0}
    counts = gate.progress
    depth, tested = float(counts.passes) / counts.tokens, float(counts.tested) / counts.tokens
    linears: list[Any] = [m for b in blocks for m in b.modules() if is_linear(m)]
    block = sum(m.weight.numel() for m in linears) / len(blocks)
    head = gate.read[-1].weight.numel()
    used = (depth * block + (1 + tested) * head) / (len(blocks) * block + head)
    return {
        "depth": depth,
        "blocks_saved": 1 - depth / len(blocks),
        "compute_saved": 1 - used,
    }


def oracle(model: nn.Module, first: list[Tensor]) -> float:
    """Share of the blocks saved if each token leaves where it first has its prediction; `first` are
    those depths.
    """
    depth = torch.cat([x.flatten() for x in first]).double().mean()
    return 1 - float(depth) / len(block_modules(model))
