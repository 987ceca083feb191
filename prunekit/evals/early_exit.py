"""What early exit saves (AdaInfer, arXiv 2403.02181), and what an oracle would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.architecture.blocks import block_modules
from prunekit.architecture.linear import is_linear
from prunekit.data.files import DataRoot
from prunekit.evals import eval_mode
from prunekit.evals.named_texts import Texts, windows_of
from prunekit.registry import Length, Positive, evals


@evals.register(context=("window",))
def early_exit(
    model: nn.Module,
    tokenizer: Any,
    *,
    texts: Texts,
    window: Length = 1024,
    limit: Positive = 8,
    batch: Positive = 1,
    bos: bool = False,
    data_root: DataRoot = None,
) -> dict[str, float]:
    """At what depth tokens leave the blocks, and what that saves; of a model without early exit
    that they pass all of them.

    Keys end in `_<text>_<window>`: `depth` (mean number of blocks), `blocks_saved` (the paper's
    share), `compute_saved` (share of the multiplications with weights; each classification costs
    those of the output matrix, so it may be negative; filling a cache is not counted),
    `exit_agreement` (share of positions with the most likely token that all blocks give) and
    `oracle_blocks_saved` (tokens leaving where they first have it).

    Args:
        texts: name -> a data set and its split, or a path.
        window: tokens.
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
            numbers = measured(model, windows, batch, name)
        found |= {f"{key}_{name}_{window}": value for key, value in numbers.items()}
    return found


@torch.inference_mode()
def measured(model: nn.Module, windows: Tensor, batch: int, name: str) -> dict[str, float]:
    """The numbers of one text `(N, T)`."""
    # By name: a model loaded with trust_remote_code has classes of its own copy of the file.
    gate: Any = next((m for m in model.modules() if type(m).__name__ == "EarlyExit"), None)
    blocks = block_modules(model)
    if gate is None:
        same = {"depth": float(len(blocks)), "blocks_saved": 0.0, "compute_saved": 0.0}
        return same | {"exit_agreement": 1.0, "oracle_blocks_saved": 0.0}
    device = next(model.parameters()).device
    right: list[Tensor] = []
    best: list[Tensor] = []
    before = gate.progress.never
    gate.progress.clear()
    try:
        for ids in tqdm(windows.split(batch), desc=name, unit="batch", leave=False):
            want, first = whole(model, gate, ids.to(device))
            gate.progress.never = False
            right.append(model(input_ids=ids.to(device), use_cache=False).logits.argmax(-1) == want)
            best.append(first)
    finally:
        gate.progress.never = before
    count = sum(t.numel() for t in best)
    depth, tested = float(gate.progress.passes) / count, float(gate.progress.tested) / count
    linears: list[Any] = [m for b in blocks for m in b.modules() if is_linear(m)]
    block = sum(m.weight.numel() for m in linears) / len(blocks)
    head = gate.read[-1].weight.numel()
    used = (depth * block + (1 + tested) * head) / (len(blocks) * block + head)
    oracle = float(torch.cat(best).double().mean()) / len(blocks)
    return {
        "depth": depth,
        "blocks_saved": 1 - depth / len(blocks),
        "compute_saved": 1 - used,
        "exit_agreement": float(torch.cat(right).double().mean()),
        "oracle_blocks_saved": 1 - oracle,
    }


def whole(model: nn.Module, gate: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely tokens (n, T) that all blocks give, and after how many blocks each position
    has it for the first time, among those at which it may leave; `(n, T)`.
    """
    passes, tokens = gate.progress.passes, gate.progress.tokens
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any, out: Any) -> None:
        y = out if isinstance(out, Tensor) else out[0]
        seen.append(gate.predictions(y.flatten(0, -2))[1].view(y.shape[:-1]))

    hooks = [gate.blocks[depth - 1].register_forward_hook(see) for depth in gate.tests]
    gate.progress.never = True
    try:
        want = model(input_ids=ids, use_cache=False).logits.argmax(-1)
    finally:
        for hook in hooks:
            hook.remove()
    gate.progress.passes, gate.progress.tokens = passes, tokens
    agrees = torch.stack([*(s == want for s in seen), torch.ones_like(want, dtype=torch.bool)], -1)
    depths = torch.tensor([*gate.tests, len(gate.blocks)], device=ids.device)
    return want, depths[agrees.int().argmax(-1)]
