"""One sub-layer solved by structured OBS at several levels (ZipLM, arXiv 2302.04089; SlimGPT, arXiv
2412.18110): greedy removal is nested, so one pass gives the units of every level, and each level
has its own ridge and refit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.activations.dense_reference import PairedStreams, UnitReader
from prunekit.activations.gram import GramStatistics, added
from prunekit.checkpoint.remote_code.runtime_modules import Bypass
from prunekit.solvers.least_squares import prior_ridge, ridge_problem
from prunekit.solvers.obs import columns_left, greedy_removal
from prunekit.solvers.validated_ridge import Ridges, refitted

Solution = dict[str, Tensor]
"""One sub-layer on disk: `order`, `costs`, `removed`, `errors`, `outputs` (of a `Bypass`, 0 where
none can stand), and for each level that keeps some units `ridge.K`, `weight.K (outputs, inputs that
stay)` and, with a bias, `bias.K`, where K units are gone."""


@dataclass(frozen=True)
class LevelOptions:
    """What is solved for each sub-layer.

    Attributes:
        levels: parts into which its units are divided; level k lacks k of them.
        whole: whether the sub-layer itself may go.
        bias: readers get a bias.
        relative: a token's error counts relative to its size.
        ridge: in tokens; None = chosen for each level by text that it is not fitted to.
    """

    levels: int
    whole: bool
    bias: bool
    relative: bool
    ridge: float | None


def counts_of_levels(units: int, levels: int, whole: bool) -> list[int]:
    """Units that are gone at each level: 0, 1/levels .. of them, one unit at least left; then all,
    where `whole`.
    """
    steps = {min(round(units * k / levels), units - 1) for k in range(levels)}
    return sorted(steps | ({units} if whole else set()))


def solve_levels(
    folds: list[GramStatistics], r: UnitReader, how: LevelOptions, outputs: int
) -> Solution:
    """All levels of one sub-layer from its statistics; `outputs` of the module that could stand in
    its place, 0 for none.
    """
    weight, units, stats = r.reader.weight, r.reader.member.index, added(folds)
    start = Ridges(prior_ridge(len(stats.gram)) if how.ridge is None else how.ridge, 0.0)
    task = ridge_problem(stats, weight, start.ridge, how.bias)
    order, costs = greedy_removal(task.best, task.inverse(), units, len(units))
    removed = counts_of_levels(len(units), how.levels, how.whole and outputs > 0)
    found: Solution = {
        "order": torch.tensor(order),
        "costs": torch.tensor(costs, dtype=torch.float64).cumsum(0) / stats.tokens,
        "removed": torch.tensor(removed),
        "outputs": torch.tensor(outputs),
    }
    errors = []
    choose = ["ridge"] if how.ridge is None else []
    for count in removed:
        lost, bias = weight.double().clone(), None
        if not count:
            lost.zero_()
        elif count == len(units):
            own: Tensor | None = r.reader.module.bias  # type: ignore[assignment]
            bias = None if own is None else -own.double()
        else:
            mask = torch.ones(len(units), dtype=torch.bool)
            mask[order[:count]] = False
            columns = columns_left(units, mask, len(stats.gram)).to(weight.device)
            A, bias, ridges = refitted(folds, weight, columns, how.bias, start, choose)
            lost[:, columns] -= A
            found |= {f"ridge.{count}": torch.tensor(ridges.ridge), f"weight.{count}": A.to(weight)}
            if bias is not None:
                found[f"bias.{count}"] = bias.to(weight)
        errors.append(squared_error(stats, lost, bias))
    return found | {"errors": torch.tensor(errors, dtype=torch.float64)}


def squared_error(stats: GramStatistics, lost: Tensor, bias: Tensor | None) -> float:
    """Of an output that lacks `lost (outputs, inputs)` of its map and has `bias` more, a token."""
    error = ((lost @ stats.gram.double()) * lost).sum()
    if bias is not None:
        error = error - 2 * bias @ (lost @ stats.sum_x.double()) + stats.total * bias @ bias
    return max(0.0, float(error) / stats.tokens)


def bypass_outputs(streams: PairedStreams, block: str, r: UnitReader) -> int:
    """How many outputs a `Bypass` in place of the sub-layer gives; 0 where the sub-layer is no
    module of its own, or where such a module does something else than a reader that gives zeros.
    """
    inside, _, _ = r.inside.rpartition(".")
    prefix = f"{block}.{inside}."
    if not inside or not all(m.param.startswith(prefix) for m in r.group.members):
        return 0
    module = streams.before
    parent, _, leaf = inside.rpartition(".")
    owner, sublayer = module.get_submodule(parent), module.get_submodule(inside)
    seen: list[int] = []

    def count(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(len(out) if isinstance(out, tuple) else 1)

    def nothing(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return torch.zeros_like(out)

    def output() -> Tensor:
        x = streams.own[streams.feed.rows[0]]
        return streams.feed.forward(module, streams.block, 0, x)

    hooks = [
        sublayer.register_forward_hook(count),
        r.reader.module.register_forward_hook(nothing),
    ]
    try:
        expected = output()
    finally:
        for hook in hooks:
            hook.remove()
    setattr(owner, leaf, Bypass(seen[0]).train(sublayer.training))
    try:
        found = output()
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        return 0  # the block asks for more of the module than its outputs
    finally:
        setattr(owner, leaf, sublayer)
    return seen[0] if torch.allclose(found, expected, rtol=1e-4, atol=1e-5) else 0
