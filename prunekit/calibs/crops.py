"""Random stretches of a data set's text, drawn by LLM-Pruner's rule (arXiv 2305.11627, released
code).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prunekit.data.crops import crops
from prunekit.data.datasets import Dataset, default_split, texts
from prunekit.data.files import DataRoot
from prunekit.registry import Length, Positive, Seed, calibs


@calibs.register(context=("length",))
def crop(
    tokenizer: Any,
    *,
    dataset: Dataset = "pydocs",
    split: str | None = None,
    samples: Positive = 10,
    length: Length = 64,
    seed: Seed = 42,
    join: bool = True,
    glue: str = "\n\n",
    data_root: DataRoot = None,
) -> Tensor:
    """Random rows of a data set and a random stretch of `length` tokens out of each, as LLM-Pruner
    calibrates.

    `join` lets short rows run on into the next ones, `glue` between them. Returns `(N, T)` int64.
    Raises ConfigError.
    """
    rows = texts(dataset, split or default_split(dataset, "calibrate"), data_root)
    return crops(rows, tokenizer, samples=samples, length=length, seed=seed, join=join, glue=glue)
