"""Structured optimal brain surgeon, block by block (ZipLM, Kurtic et al., NeurIPS 2023, arXiv
2302.04089; SlimGPT, arXiv 2412.18110).

Heads and neurons go one at a time, the one whose removal costs least by `tr(W_S (H^-1_SS)^-1
W_S^T)` first; what remains of the module that reads them (`o_proj`, `down_proj`) is then the least
squares map, in closed form. Beyond the papers, each as an option: the map aims at the dense
network's residual stream instead of the module's own former output, so that a block repairs what
earlier ones broke; it has a bias; errors count relative to the size of the token's residual stream,
which makes costs comparable across blocks, so that a budget of parameters can go wherever it costs
least.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit import graph
from prunekit.activations.blockwise import Feeding, Store, capture, stack, walk
from prunekit.activations.dense_reference import Part, Streams, adds_up, importance, look, parts_of
from prunekit.activations.gram import Normal, problem, warn_of_little_text
from prunekit.activations.moments import samples_at_once
from prunekit.activations.runs import WholeRun
from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError
from prunekit.registry import Positive, pruners
from prunekit.selection.budget import cheapest
from prunekit.selection.eligible import of_kinds, spared
from prunekit.solvers.bias_compensation import add_biases
from prunekit.solvers.obs import removal
from prunekit.types import Counts, Group, Kept, Pruned, Scores, tensor_of

KINDS = ["heads", "neurons"]


@dataclass(frozen=True)
class Recipe:
    """The options that say which regression is solved (see `obs`)."""

    target: str
    bias: bool
    relative: bool
    damp: float
    repair: int


@pruners.register(
    paper="arXiv 2302.04089, 2412.18110", year=2024, needs="data", out="self-contained", kinds=()
)
@torch.no_grad()
def obs(
    model: nn.Module,
    tokens: Tensor,
    criterion: Callable[..., Scores] | None,
    ratio: Callable[..., Counts],
    exclude: Callable[[list[Group]], list[Group]],
    *,
    kinds: list[Literal["heads", "neurons"]] = ["heads", "neurons"],  # noqa: B006 (never mutated; the YAML states the same)
    allocation: Literal["cost", "ratio"] = "cost",
    target: Literal["own", "dense"] = "own",
    bias: bool = True,
    weigh: Literal["relative", "equal"] = "relative",
    damp: float = 0.01,
    repair: Positive = 32768,
    scout: Positive = 16384,
    store: Store = "memory",
    precision: Literal["bf16", "model"] = "bf16",
    verify: bool = True,
) -> Pruned:
    """Removes heads and neurons by their exact quadratic cost and refits the modules that read them
    in closed form, block by block.

    `allocation=cost` spends the parameters that `ratio` would remove wherever they cost least, by
    costs on the dense model over the first `scout` tokens; `ratio` keeps the ratio's counts.
    `weigh` says how much a token's error counts: relative to the token's size, or equally.
    `target=own` keeps the readers' outputs where they are; `dense` moves the residual stream back
    to the dense network's, as far as the text outweighs `repair` tokens (ahead at 20 % of
    SmolLM2-135M, behind at 50 %). `bias` gives the readers a bias. `damp` is the ridge of the refit
    in units of the gram's mean diagonal. `store`: where activations wait. `precision=bf16`:
    forwards in bfloat16; sums are float32, solutions float64 either way. Nothing changes where the
    ratio removes nothing. Raises ConfigError for units that no linear module of a block reads.
    """
    everything = graph.discover(model, verify=verify)
    groups = spared(of_kinds(model, everything, kinds), exclude)
    blocks = stack(everything)
    served = [g for g in everything if g.kind in KINDS]
    parts = [parts_of(model, block, served) for block in blocks]
    _check(groups, parts)
    warn_of_little_text(tokens, max(p.reader.weight.shape[1] for row in parts for p in row))
    run = WholeRun(model, tokens)
    counts = ratio(model, groups, run)
    if not any(counts.values()):
        return Pruned(model, {}, groups, {}, {"counts": counts})
    recipe = Recipe(target, bias, weigh == "relative", damp, repair)
    feeding = Feeding(samples_at_once(run), store, precision == "bf16")
    if allocation == "cost":
        sizes = Sizes(model, groups)
        curves = _curves(model, blocks, parts, set(counts), _first(tokens, scout), recipe, feeding)
        counts = cheapest(
            curves, {g.name: sizes.removed({g.name: 1}) for g in groups}, sizes.removed(counts)
        )
    kept, notes = _prune(model, blocks, parts, tokens, counts, recipe, feeding)
    graph.remove(model, kept)
    return Pruned(model, kept, groups, {}, {"counts": counts, **notes})


def _first(tokens: Tensor, count: int) -> Tensor:
    """The first samples that hold `count` tokens, at least one."""
    return tokens[: max(1, count // tokens.shape[1])]


def _check(groups: list[Group], parts: list[list[Part]]) -> None:
    served = {p.group.name for row in parts for p in row}
    lost = [g.name for g in groups if g.name not in served]
    if lost:
        more = f" and {len(lost) - 1} more groups" if len(lost) > 1 else ""
        raise ConfigError(
            f"obs needs one linear module in the block that reads the units; {lost[0]}{more} have "
            "none: narrow pruner.kinds"
        )


# ---- costs on the dense model


def _curves(
    model: nn.Module,
    blocks: tuple[str, ...],
    parts: list[list[Part]],
    contest: set[str],
    tokens: Tensor,
    recipe: Recipe,
    feeding: Feeding,
) -> dict[str, Tensor]:
    """Group name -> what removing 1, 2, .. of its units costs on the dense model, per token."""
    curves = {}
    for row, run in zip(parts, walk(model, blocks, tokens, feeding), strict=True):
        stats = {
            p.inside: Normal(p.reader.weight.shape[1], 0, p.reader.weight.device, feeding.bf16)
            for p in row
        }
        for i, rows in enumerate(run.feed.rows):
            seen = look(run.feed, run.module, run.block, i, run.inputs[rows], list(stats))
            for p in row:
                stats[p.inside].add(
                    seen.x[p.inside], None, *importance(seen.after[p.inside], recipe.relative)
                )
        for p in row:
            if p.group.name in contest:
                s = stats[p.inside]
                W = p.reader.weight
                inverse = problem(s, W, recipe.damp, recipe.bias).inverse()
                _, costs = removal(W, inverse, p.reader.member.index, p.group.units)
                curves[p.group.name] = torch.tensor(costs).cumsum(0) / s.tokens
    return curves


# ---- the pass


def _prune(
    model: nn.Module,
    blocks: tuple[str, ...],
    parts: list[list[Part]],
    tokens: Tensor,
    counts: Counts,
    recipe: Recipe,
    feeding: Feeding,
) -> tuple[Kept, dict[str, Any]]:
    """Choose, zero and refit block by block; the units are cut out afterwards, all at once. Returns
    the choice and notes.
    """
    own, feed = capture(model, blocks, tokens, feeding)
    dense = own.clone() if recipe.target == "dense" else None
    kept: Kept = {}
    apart = []
    for b, row in enumerate(tqdm(parts, desc="obs", unit="block", delay=2)):
        module = model.get_submodule(blocks[b])
        before = copy.deepcopy(module) if dense is not None else module
        names = [p.inside for p in row]
        streams = Streams(
            feed, b, names, before, dense, own, adds_up(feed, b, before, dense or own, names)
        )
        if not streams.adds:
            apart.append(blocks[b])
        for p in row:
            if counts.get(p.group.name):
                stats = streams.regression(module, p, recipe.relative)
                kept[p.group.name] = _operate(model, p, stats, counts[p.group.name], recipe)
        if b + 1 < len(blocks):
            streams.advance(module)
    return kept, {"apart": apart}


def _operate(model: nn.Module, p: Part, stats: Normal, count: int, recipe: Recipe) -> Tensor:
    """Zero `count` units and refit the reader to the others, in place. Returns the mask of the
    units that stay.
    """
    reader, units = p.reader, p.reader.member.index
    task = problem(stats, reader.weight, recipe.damp, recipe.bias, recipe.repair)
    mask = torch.ones(p.group.units, dtype=torch.bool)
    order, _ = removal(task.best, task.inverse(), units, count)
    mask[order] = False
    stays = torch.ones(len(task.gram), dtype=torch.bool)
    stays[units[~mask].flatten()] = False
    columns = stays.nonzero()[:, 0].to(reader.weight.device)
    A, b = task.solve(columns)
    for m in p.group.members:
        tensor = tensor_of(model, m.param)
        if isinstance(tensor, nn.Parameter):
            tensor.index_fill_(m.axis, m.index[~mask].flatten().to(tensor.device), 0)
    reader.weight[:, columns] = A.to(reader.weight)
    if b is not None:
        add_biases(model, {reader.name: b})
    return mask
