"""Several texts in given shares: general text for calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn

from prunekit.data.duplicates import new_rows
from prunekit.errors import ConfigError
from prunekit.registry import Component, Length, Positive, Seed, built, calibs, draw

OF_THE_MIX = ("samples", "length", "seed")
"""Options of the mix, which say for every source how much it draws."""
ROUNDS = 8
"""Draws of one source before it counts as exhausted."""


@dataclass(frozen=True)
class Source:
    """A calib, and its share of the samples."""

    calib: Component
    share: float


def _sources(nodes: Any) -> dict[str, Source]:
    if not isinstance(nodes, dict) or not nodes:
        raise ValueError("a mix names its texts: {web: {share: 0.5, name: crop, dataset: c4}, ...}")
    return {str(name): _source(str(name), node) for name, node in nodes.items()}


def _source(name: str, node: Any) -> Source:
    if isinstance(node, Source):
        return node
    share = node.get("share") if isinstance(node, dict) else None
    if not isinstance(share, (int, float)) or not share > 0:
        raise ValueError(f"{name} needs a share above 0")
    taken = [k for k in OF_THE_MIX if k in node]
    if taken:
        raise ValueError(f"{name} sets {', '.join(taken)}: the mix says that for all of its texts")
    calib = built("calib", {k: v for k, v in node.items() if k != "share"})
    if not set(OF_THE_MIX) <= calib.entry.types.keys():
        raise ValueError(f"{name}: calib={calib.name} cannot be part of a mix")
    return Source(calib, float(share))


Sources = Annotated[Any, BeforeValidator(_sources)]


@calibs.register(needs="model", context=("length",))
def mix(
    tokenizer: Any,
    model: nn.Module,
    *,
    texts: Sources,
    samples: Positive = 64,
    length: Length = 1024,
    seed: Seed = 42,
) -> Tensor:
    """Samples of several texts in given shares, evenly interleaved, none of them twice.

    A sample that mostly repeats earlier ones is drawn anew. Any first part of the samples has
    about the same shares as all.

    Args:
        texts: name -> a calib with its options and its `share`; shares are relative to their sum.
        samples: N, of all texts together.
        length: T, tokens of a sample.
        seed: of every text's own generator.

    Returns `(N, T)` int64. Raises ConfigError where a text runs out of samples.
    """
    counts = whole_shares({name: s.share for name, s in texts.items()}, samples)
    rows, places = [torch.empty(0, length, dtype=torch.int64)], []
    for name, count in counts.items():
        if count:
            calib = texts[name].calib
            rows.append(_draw(name, calib, tokenizer, model, torch.cat(rows), count, length, seed))
            places += [(i + 0.5) / count for i in range(count)]
    return torch.cat(rows)[torch.tensor(places).argsort(stable=True)]


def whole_shares(shares: dict[str, float], total: int) -> dict[str, int]:
    """`total` in whole numbers, in proportion to the shares (largest remainders)."""
    exact = {name: share / sum(shares.values()) * total for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in order[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _draw(
    name: str,
    calib: Component,
    tokenizer: Any,
    model: nn.Module,
    known: Tensor,
    count: int,
    length: int,
    seed: int,
) -> Tensor:
    """`count` samples of one text that repeat neither `known` ones nor each other."""
    found = known
    for turn in range(ROUNDS):
        lacking = count - (len(found) - len(known))
        options = {"samples": lacking, "length": length, "seed": seed + turn}
        drawn = draw(Component(calib.entry, calib.options | options), tokenizer, model)
        found = torch.cat([found, drawn[new_rows(drawn, found)]])
        if len(found) == len(known) + count:
            return found[len(known) :]
    raise ConfigError(
        f"calib=mix: {name} has {len(found) - len(known)} samples of {length} tokens that do not "
        f"repeat each other, and its share is {count}: give it a smaller share, or more text"
    )
