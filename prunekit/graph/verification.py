"""The proof, on a small model: a unit may be pruned if removing it gives the logits that zeroing it
gives; found by trying what must follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.graph.generation_check import same_with_cache
from prunekit.graph.groups import Candidate, Pattern
from prunekit.graph.masked_reference import Masked
from prunekit.graph.masks import Masks, bypass, gone, lost_modules, to_keep, zero_block, zero_slices
from prunekit.graph.skeleton import (
    ERRORS,
    block_kinds,
    clone,
    drop_blocks,
    logits_of,
    natural,
    quiet,
)
from prunekit.graph.slicing import Recipe, follow, plain_experts, set_sizes, shrink
from prunekit.graph.trace import trace
from prunekit.types import Group

TOLERANCE = 1e-4
MOVES = 1e-3
"""Relative: removal must match its reference to the first, and the reference must differ from the
dense logits by the second.
"""
STALE = 20
"""After so many recipes with which only the cache fails, none is expected to mend it."""
RANDOM = "two runs on the same input give different logits, so nothing can be compared"
UNMOVED = "removing units does not move the logits, so nothing would be proven"


@dataclass(frozen=True)
class Verdict:
    """What came of a proof: the recipe, or the reason why there is none; `bypass`: all-zero
    parameters do not make a block the identity.
    """

    recipe: Recipe | None
    reason: str = ""
    bypass: bool = False


def duplicate(model: nn.Module) -> nn.Module:
    return clone(model, lambda t: t.detach().clone())


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return logits_of(model(**inputs)).float()


def masked_logits(
    model: nn.Module,
    inputs: dict[str, Any],
    asked: Sequence[tuple[Candidate, Masks]],
    skip: frozenset[tuple[str, int]],
) -> Tensor:
    """Logits with the units' slices zeroed and statistics over the kept channels: what removal must
    reproduce.
    """
    zeroed = duplicate(model)
    quiet(zeroed)
    zero_slices(zeroed, [(c.group, masks) for c, masks in asked])
    lost = [(m.param, m.axis, index) for c, masks in asked for m, index in gone(c.group, masks)]
    return logits_of(trace(zeroed, inputs, Masked(zeroed, skip, lost))[1]).float()


def some_masks(candidate: Candidate, share: float, seed: int) -> Masks:
    """The same random units at every member."""
    n = candidate.group.units
    lost = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[
        : min(max(1, round(n * share)), n - candidate.least)
    ]
    mask = torch.ones(n, dtype=torch.bool)
    mask[lost] = False
    return {(m.param, m.axis): mask for m in candidate.group.members}


def prove(
    model: nn.Module,
    inputs: dict[str, Any],
    everything: Sequence[Candidate],
    skip: frozenset[tuple[str, int]] = frozenset(),
    caches: bool = False,
    share: float = 0.3,
) -> dict[Pattern, Verdict]:
    """A verdict for every pattern among the candidates and their spares; a spare is tried only
    where what it stands in for fails.
    """
    case = Case(model, inputs, everything, run(model, inputs), skip, caches)
    if not torch.allclose(run(model, inputs), case.dense):
        return {o.pattern: Verdict(None, RANDOM) for c in everything for o in (c, *c.spare)}
    verdicts: dict[Pattern, Verdict] = {}
    level = list(everything)
    while level:
        for pattern in dict.fromkeys(c.pattern for c in level):
            if pattern not in verdicts:
                same = [c for c in level if c.pattern == pattern]
                verdicts[pattern] = prove_pattern(case, same, share)
        level = [c.spare[0] for c in level if c.spare and verdicts[c.pattern].recipe is None]
    return verdicts


@dataclass(frozen=True)
class Case:
    """What all proofs on one model share."""

    model: nn.Module
    inputs: dict[str, Any]
    everything: Sequence[Candidate]
    dense: Tensor
    skip: frozenset[tuple[str, int]]
    caches: bool
    """Whether the unpruned model generates the same with a cache as without; what is removed must
    leave it so.
    """


def disagreement(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Why the unpruned model cannot show that its cache survives pruning; nothing if it can."""
    dense = duplicate(model)
    natural(dense)
    return same_with_cache(dense, inputs)


def prove_pattern(case: Case, same: Sequence[Candidate], share: float, draws: int = 4) -> Verdict:
    """Widths that differ from layer to layer decide what must follow; equal widths, whether the
    shared config may follow as well.

    Units that do not matter for this input (experts that no token took) prove nothing: others are
    drawn.
    """
    verdict = Verdict(None, "every draw removed nothing")
    for seed in range(0, 100 * draws, 100):
        shares = [share, 0.5] if seed % 200 == 0 else [share / 2, share]
        uneven = [(c, some_masks(c, shares[i % 2], seed + i)) for i, c in enumerate(same)]
        verdict = prove_one(case, uneven, list(recipes(case.model, uneven)))
        if verdict.reason != UNMOVED:
            break
    if verdict.recipe is None:
        return verdict
    even = [(c, some_masks(c, share, seed + i)) for i, c in enumerate(same)]
    found = needed(case, uneven, verdict.recipe.attributes)
    return prove_one(case, even, [Recipe(found, config=True), Recipe(found, config=False)])


def needed(
    case: Case, asked: Sequence[tuple[Candidate, Masks]], found: frozenset[tuple[str, str]]
) -> frozenset[tuple[str, str]]:
    """The recipe without the doubtful sizes that it does not need: a kernel width may equal a rank
    by chance.
    """
    for attribute in sorted(
        found & frozenset(k for k, doubtful in sizes_in(case.model, asked).items() if doubtful)
    ):
        if prove_one(case, asked, [Recipe(found - {attribute}, config=False)]).recipe is not None:
            found -= {attribute}
    return found


def sizes_in(
    model: nn.Module, asked: Sequence[tuple[Candidate, Masks]]
) -> dict[tuple[str, str], bool]:
    """(module class, attribute) of every size that may have to follow -> whether that
    is doubtful.
    """
    sizes: dict[tuple[str, str], bool] = {}
    for c, _ in asked:
        for (_, attr), (cls, _, _, doubtful) in follow(c, 1, model).items():
            sizes[cls, attr] = sizes.get((cls, attr), False) or doubtful
    return sizes


def prove_one(
    case: Case,
    asked: Sequence[tuple[Candidate, Masks]],
    options: Sequence[Recipe],
    tries: int = 150,
) -> Verdict:
    """Try recipes, simplest first, until removal equals the reference, the parameters fall by the
    slices' sizes, and ties hold.
    """
    model, inputs, everything, dense, skip = (
        case.model,
        case.inputs,
        case.everything,
        case.dense,
        case.skip,
    )
    reference = masked_logits(model, inputs, asked, skip)
    scale = max(1.0, float(reference.abs().max()))
    if not torch.isfinite(reference).all():
        return Verdict(None, "the reference is not finite")
    if float((reference - dense).abs().max()) < MOVES * scale:
        return Verdict(None, UNMOVED)
    expected = count_after(model, asked)
    pattern = asked[0][0].pattern
    reason, stale = "", []
    for recipe in options[:tries]:
        small = duplicate(model)
        shrink(small, everything, asked, {pattern: recipe})
        if sum(p.numel() for p in small.parameters()) != expected:
            return Verdict(None, "the parameter count does not fall by what the slices hold")
        try:
            off = float((run(small, inputs) - reference).abs().max()) / scale
            if off < TOLERANCE and natural(small):
                set_sizes(small, plain_experts(small, asked), own=False)
                off = float((run(small, inputs) - reference).abs().max()) / scale
        except ERRORS as e:
            reason = (
                reason or f"{type(e).__name__}: {str(e).splitlines()[0][:100] if str(e) else ''}"
            )
            continue
        if not off < TOLERANCE:
            reason = f"removal differs from zeroing by {off:.1e}"
            continue
        stale.append(same_with_cache(small, inputs) if case.caches else "")
        if not stale[-1]:
            return Verdict(recipe)
        if len(stale) == STALE:
            break
    return Verdict(
        None,
        f"removal equals zeroing, but not when generating with a cache: {stale[0]}"
        if stale
        else reason,
    )


def count_after(model: nn.Module, asked: Sequence[tuple[Candidate, Masks]]) -> int:
    keep = to_keep(model, [(c.group, masks) for c, masks in asked])
    total = 0
    for name, p in model.named_parameters():
        n = p.numel()
        for axis, index in keep.get(name, {}).items():
            n = n // p.shape[axis] * len(index)
        total += n
    for c, masks in asked:
        total -= sum(
            p.numel()
            for i in lost_modules(c.group, masks)
            for p in model.get_submodule(c.group.modules[i]).parameters()
        )
    return total


def recipes(model: nn.Module, asked: Sequence[tuple[Candidate, Masks]]) -> Iterator[Recipe]:
    """Which sizes follow: first all that are certain, then none, then with configs, then the
    doubtful, then up to three exceptions.
    """
    sizes = sizes_in(model, asked)
    plain = frozenset(
        k for k, doubtful in sizes.items() if not k[1].startswith("config.") and not doubtful
    )
    modules = frozenset(k for k in sizes if not k[1].startswith("config."))
    certain = frozenset(k for k, doubtful in sizes.items() if not doubtful)
    bases = list(
        dict.fromkeys([plain, frozenset[tuple[str, str]](), certain, modules, frozenset(sizes)])
    )
    for base in bases:
        yield Recipe(base, config=False)
    order = sorted(sizes, key=lambda k: k[1].startswith("config."))
    for size in (1, 2, 3):
        for exceptions in combinations(order, size):
            for base in bases[:3]:
                yield Recipe(base ^ frozenset(exceptions), config=False)


# ---- whole blocks

BLOCKS: Pattern = ("blocks", frozenset())


def prove_blocks(
    model: nn.Module, inputs: dict[str, Any], blocks: Group, caches: bool = False
) -> Verdict:
    """Dropping any one block must equal zeroing all its parameters; or, where that is not the
    identity, handing on its input.

    With `caches` it must generate the same with a cache as without as well, unless the block is the
    last of its kind: classes may refuse a cache where, say, no attention is left.
    """
    dense = run(model, inputs)
    path = blocks.modules[0].rpartition(".")[0]
    kinds = block_kinds(model, path)
    if not torch.allclose(run(model, inputs), dense):
        return Verdict(None, RANDOM)
    by_zeros = True
    for i in range(blocks.units):
        small, skipped, zeroed = (duplicate(model) for _ in range(3))
        drop_blocks(small, path, [j for j in range(blocks.units) if j != i])
        bypass(skipped.get_submodule(blocks.modules[i]))
        zero_block(zeroed, blocks.modules[i])
        try:
            removed, passed, silent = (run(m, inputs) for m in (small, skipped, zeroed))
        except ERRORS as e:
            return Verdict(None, f"without block {i}: {type(e).__name__}: {str(e)[:100]}")
        scale = max(1.0, float(removed.abs().max()))
        by_zeros = by_zeros and float((silent - removed).abs().max()) < TOLERANCE * scale
        off = float((passed - removed).abs().max()) / scale
        if not off < TOLERANCE and not by_zeros:
            return Verdict(
                None, f"dropping block {i} differs from handing on its input by {off:.1e}"
            )
        if float((removed - dense).abs().max()) < MOVES * scale:
            return Verdict(
                None, f"dropping block {i} does not move the logits, so nothing would be proven"
            )
        stale = same_with_cache(small, inputs) if caches and kinds.count(kinds[i]) > 1 else ""
        if stale:
            return Verdict(
                None, f"without block {i} generation with a cache is not the same: {stale}"
            )
    return Verdict(Recipe(), bypass=not by_zeros)
