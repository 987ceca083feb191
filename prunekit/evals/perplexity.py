"""Perplexity by LLM-Pruner's protocol (arXiv 2305.11627, released code): non-overlapping windows,
of any length, of one joined text.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.data.datasets import Dataset, evaluation_text
from prunekit.data.files import DataRoot, TextFile
from prunekit.evals import eval_mode
from prunekit.evals.windows import cut, token_ids, window_nll
from prunekit.registry import Positive, evals


@evals.register()
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    *,
    dataset: Dataset = "pydocs",
    split: str | None = None,
    path: TextFile | None = None,
    label: str | None = None,
    window: Positive = 128,
    batch: Positive = 4,
    limit: Positive | None = None,
    every: Positive = 1,
    block: Positive | None = None,
    bos: bool | None = None,
    data_root: DataRoot = None,
) -> dict[str, float]:
    """Perplexity of a text in windows of `window` tokens: `ppl_<dataset>_<window>` and its standard
    error.

    The token mean of the cross entropy, exponentiated; the error by the delta method over windows.
    `path` names a text or jsonl file in place of `dataset`, and `label` (default: the file's stem)
    stands for it in the key. The text is cut into blocks of `block` tokens, of which each
    `every`-th is read, and these into windows. Raises ConfigError.
    """
    text = evaluation_text(dataset, split, path, data_root)
    key = f"ppl_{label or (Path(path).stem if path else dataset)}_{window}"
    windows = cut(token_ids(text, tokenizer, bos), window, block, every, limit)
    with eval_mode(model):
        nll = window_nll(model, windows, batch, key)
    value = math.exp(nll.mean())
    error = value * float(nll.std()) / math.sqrt(len(nll)) if len(nll) > 1 else 0.0
    return {key: value, f"{key}_stderr": error}
