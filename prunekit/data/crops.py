"""LLM-Pruner's draw of calibration text: random stretches of random rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import ConfigError

log = logging.getLogger("prunekit")
BYTES = 16
"""More than a token has on average: a text of so many for each token is long enough unread."""


def crops(
    rows: Sequence[str],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    join: bool,
    glue: str = "\n\n",
) -> Tensor:
    """LLM-Pruner's calibration draw: random rows, each used once and long enough, and a random
    stretch of each. `(N, T)` int64.

    `join` lets a row that is too short run on into the next ones. Special tokens are the
    tokenizer's default, as in the original. Raises ConfigError when the rows run out.
    """
    if join:
        warn_of_repeats(rows, tokenizer, glue, samples, length)
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    drawn: list[Tensor] = []
    while len(drawn) < samples and len(seen) < len(rows):
        row = int(torch.randint(len(rows), (1,), generator=generator))
        if row in seen:
            continue
        seen.add(row)
        ids = _ids(rows, row, tokenizer, length, join, glue)
        if len(ids) >= length:
            start = int(torch.randint(len(ids) - length + 1, (1,), generator=generator))
            drawn.append(torch.tensor(ids[start : start + length]))
    if len(drawn) < samples:
        hint = "" if join else ", or let rows run on into the next with join=true"
        raise ConfigError(
            f"asked for {samples} samples of {length} tokens, but only {len(drawn)} of the "
            f"{len(rows)} rows are long enough; "
            f"ask for fewer or shorter ones{hint}"
        )
    return torch.stack(drawn)


def _ids(
    rows: Sequence[str], row: int, tokenizer: Any, length: int, join: bool, glue: str
) -> list[int]:
    """Token ids of a row, with `join` of as many rows as give `length`; empty where the text cannot
    reach it.
    """
    text = rows[row]
    ahead = row + 1
    while True:
        # a token covers one byte at least (8 for what a tokenizer adds), so shorter text needs no
        # tokenizing
        ids = tokenizer(text).input_ids if len(text.encode()) + 8 >= length else []
        if len(ids) >= length or not join or ahead == len(rows):
            return ids
        text, ahead = text + glue + rows[ahead], ahead + 1


def warn_of_repeats(
    rows: Sequence[str], tokenizer: Any, glue: str, samples: int, length: int
) -> None:
    """Say so where more tokens are asked for than the rows have: stretches overlap then, and
    statistics take what repeats for new text.
    """
    asked, size = samples * length, 0
    for row in rows:
        size += len(row.encode())
        if size > BYTES * asked:
            return
    there = len(tokenizer(glue.join(rows), verbose=False).input_ids)
    if there < asked:
        log.warning(
            "calibration asks for %d tokens of a text that has %d: its stretches repeat each "
            "other, and statistics take that for new text; ask for calib.samples=%d at most, or "
            "give more text",
            asked,
            there,
            max(1, there // length),
        )
