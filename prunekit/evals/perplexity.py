"""Perplexity by LLM-Pruner's protocol (arXiv 2305.11627, released code): non-overlapping windows,
of any length, of one joined text.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.architecture.modes import eval_mode
from prunekit.data.datasets import Dataset, check_split, default_split, evaluation_text
from prunekit.data.files import DataRoot, TextFile
from prunekit.data.kept_prompt import prompt_ids
from prunekit.evals.texts_read import splits_read
from prunekit.evals.windows import check_block, cut, token_ids, window_nll
from prunekit.registry import Component, Length, Positive, evals

log = logging.getLogger("prunekit")


def key_of(*, dataset: str, path: str | None, label: str | None, window: int, **_: Any) -> str:
    """`ppl_<dataset>_<window>`."""
    return f"ppl_{label or (Path(path).stem if path else dataset)}_{window}"


def check_perplexity(
    calib: Component,
    *,
    dataset: str,
    split: str | None,
    path: str | None,
    window: int,
    block: int | None,
    **_: Any,
) -> None:
    """Raises ConfigError for blocks that windows do not divide, and for a split that there is not;
    warns where the text is the one that `calib` reads.
    """
    check_block(window, block or window)
    part = split or default_split(dataset, "evaluate")
    if path is None:
        check_split(dataset, part)
    if (str(Path(path).expanduser().resolve()) if path else (dataset, part)) in splits_read(calib):
        log.warning(
            "calib=%s reads %s, which perplexity is measured on: the numbers are no test",
            calib.name,
            path or f"{dataset} ({part})",
        )


@evals.register(context=("window",), key=key_of, check=check_perplexity)
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    *,
    dataset: Dataset = "pydocs",
    split: str | None = None,
    path: TextFile | None = None,
    label: str | None = None,
    window: Length = 128,
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
    A prompt that a pruner left with the model stands before each.

    Args:
        path: a text or jsonl file in place of `dataset`.
        label: in place of the data set's name, or of the file's stem, in the key.
        window: tokens.
        batch: windows at a time.
        limit: the first so many windows.
        every: each so-manieth block is read, and cut into windows.
        block: tokens of a block; null is a window.
        bos: one BOS in front of the text; null is what the tokenizer puts around it.

    Raises ConfigError where the text is not there or shorter than a block.
    """
    text = evaluation_text(dataset, split, path, data_root)
    key = key_of(dataset=dataset, path=path, label=label, window=window)
    ids = token_ids(text, tokenizer, bos)
    windows = cut(ids, window, block=block, every=every, limit=limit)
    with eval_mode(model):
        nll = window_nll(model, windows, batch, key, prompt_ids(model, tokenizer))
    value = float(nll.mean().exp())
    error = value * float(nll.std()) / math.sqrt(len(nll)) if len(nll) > 1 else 0.0
    return {key: value, f"{key}_stderr": error}
