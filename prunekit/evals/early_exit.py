"""What early exit saves (AdaInfer, arXiv 2403.02181), and what an oracle would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.architecture.modes import eval_mode
from prunekit.data.files import DataRoot
from prunekit.evals.exits import all_blocks, gate_of, leaving, oracle, saved
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
    gate = gate_of(model)
    if gate is None:
        return saved(model, gate) | {"exit_agreement": 1.0, "oracle_blocks_saved": 0.0}
    device = next(model.parameters()).device
    parts = tqdm(windows.split(batch), desc=name, unit="batch", leave=False)
    with all_blocks(model, gate) as whole:
        for ids in parts:
            model(input_ids=ids.to(device), use_cache=False)
    right = []
    with leaving(gate):
        for ids, (want, _) in zip(windows.split(batch), whole, strict=True):
            right.append(model(input_ids=ids.to(device), use_cache=False).logits.argmax(-1) == want)
    return saved(model, gate) | {
        "exit_agreement": float(torch.cat(right).double().mean()),
        "oracle_blocks_saved": oracle(model, [first for _, first in whole]),
    }
