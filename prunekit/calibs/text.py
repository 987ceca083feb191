"""Calibration tokens out of any text or jsonl file."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from prunekit.data.crops import crops
from prunekit.data.datasets import document
from prunekit.data.files import TextFile, is_records, read
from prunekit.errors import ConfigError
from prunekit.registry import Length, Positive, Seed, calibs


@calibs.register(context=("length",))
def text(
    tokenizer: Any,
    *,
    path: TextFile,
    field: str = "text",
    take: Literal["first", "random"] = "first",
    samples: Positive = 10,
    length: Length = 64,
    seed: Seed = 42,
    join: bool = True,
) -> Tensor:
    """The first tokens of a text or jsonl file, or random stretches of it.

    `first` tokenizes without special tokens and cuts; `random` draws lines or records as `crop`
    does. Returns `(N, T)` int64. Raises ConfigError.
    """
    rows = [r[field] for r in read(path, (field,))]
    lines = not is_records(path)
    if take == "random":
        return crops(
            rows,
            tokenizer,
            samples=samples,
            length=length,
            seed=seed,
            join=join,
            glue="" if lines else "\n\n",
        )
    ids = tokenizer("".join(rows) if lines else document(rows), add_special_tokens=False).input_ids
    if len(ids) < samples * length:
        raise ConfigError(
            f"{path} has {len(ids)} tokens, fewer than {samples} samples of {length}; "
            f"ask for fewer (there are {len(ids) // length} of that length) or shorter ones"
        )
    return torch.tensor(ids[: samples * length]).view(samples, length)
