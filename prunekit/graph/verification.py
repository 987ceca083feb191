"""The proof, on a small model: a unit may be pruned if removing it gives the logits that zeroing it
gives; found by trying what must follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import in_short
from prunekit.graph.generation_check import cache_difference
from prunekit.graph.groups import Candidate, Cut, Pattern
from prunekit.graph.masked_reference import Masked
from prunekit.graph.masks import to_keep, zero_slices
from prunekit.graph.model_settings import restore_own_code, use_plain_code
from prunekit.graph.module_sizes import Recipe, Setting, plain_experts, set_sizes
from prunekit.graph.recipes import recipes, sizes_in
from prunekit.graph.sample_run import ERRORS, logits_of
from prunekit.graph.skeleton import clone
from prunekit.graph.slicing import shrink
from prunekit.graph.trace import trace

TOLERANCE = 1e-4
MOVES = 1e-3
"""Relative: removal must match its reference to the first, and the reference must differ from the
dense logits by the second.
"""
STALE = 20
"""After so many recipes with which only the cache fails, none is expected to help."""
RANDOM = "two runs on the same input give different logits, so nothing can be compared"
UNMOVED = "removing units does not move the logits, so nothing would be proven"


@dataclass(frozen=True)
class Verdict:
    """What came of a proof: the recipe, or the reason why there is none.

    moved: whether the units mattered for the input at all.
    bypass: all-zero parameters do not make a block the identity.
    """

    recipe: Recipe | None
    reason: str = ""
    moved: bool = True
    bypass: bool = False


def duplicate(model: nn.Module) -> nn.Module:
    return clone(model, lambda t: t.detach().clone())


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return logits_of(model(**inputs)).float()


def masked_logits(
    model: nn.Module,
    inputs: dict[str, Any],
    cuts: Sequence[Cut],
    skip: frozenset[tuple[str, int]],
) -> Tensor:
    """Logits with the units' slices zeroed and statistics over the kept channels: what removal must
    reproduce.
    """
    zeroed = duplicate(model)
    use_plain_code(zeroed)
    zero_slices(zeroed, [c.units for c in cuts])
    lost = [(m.param, m.axis, index) for c in cuts for m, index in c.units.slices()]
    return logits_of(trace(zeroed, inputs, Masked(zeroed, skip, lost))[1]).float()


def random_cut(candidate: Candidate, share: float, seed: int) -> Cut:
    """The same random units at every member."""
    n = candidate.group.units
    lost = min(max(1, round(n * share)), n - candidate.least)
    mask = torch.ones(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:lost]] = False
    return Cut.everywhere(candidate, mask)


@dataclass(frozen=True)
class Case:
    """What all proofs on one model share. `caches`: whether the unpruned model generates the same
    with a cache as without; what is removed must leave it so.
    """

    model: nn.Module
    inputs: dict[str, Any]
    everything: Sequence[Candidate]
    dense: Tensor
    skip: frozenset[tuple[str, int]]
    caches: bool


def prove(
    model: nn.Module,
    inputs: dict[str, Any],
    everything: Sequence[Candidate],
    skip: frozenset[tuple[str, int]] = frozenset(),
    caches: bool = False,
    share: float = 0.3,
) -> dict[Pattern, Verdict]:
    """A verdict for every pattern among the candidates and their alternatives, which are tried
    one after the other.
    """
    case = Case(model, inputs, everything, run(model, inputs), skip, caches)
    if not torch.allclose(run(model, inputs), case.dense):
        return {o.pattern: Verdict(None, RANDOM) for c in everything for o in (c, *c.alternatives)}
    verdicts: dict[Pattern, Verdict] = {}
    level = list(everything)
    while level:
        for pattern in dict.fromkeys(c.pattern for c in level):
            if pattern not in verdicts:
                same = [c for c in level if c.pattern == pattern]
                verdicts[pattern] = prove_pattern(case, same, share)
        level = [
            c.alternatives[0]
            for c in level
            if c.alternatives and verdicts[c.pattern].recipe is None
        ]
    return verdicts


def dense_cache_difference(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """Why the unpruned model cannot show that its cache survives pruning."""
    dense = duplicate(model)
    restore_own_code(dense)
    return cache_difference(dense, inputs)


@dataclass(frozen=True)
class Target:
    """What removing the units of some cuts must come to: logits, and a number of parameters."""

    cuts: Sequence[Cut]
    logits: Tensor
    parameters: int


def target_of(case: Case, cuts: Sequence[Cut]) -> Target | Verdict:
    """A verdict where the cuts could prove nothing."""
    reference = masked_logits(case.model, case.inputs, cuts, case.skip)
    if not torch.isfinite(reference).all():
        return Verdict(None, "the reference is not finite")
    if _difference(case.dense, reference) < MOVES:
        return Verdict(None, UNMOVED, moved=False)
    return Target(cuts, reference, count_after(case.model, cuts))


def prove_pattern(case: Case, same: Sequence[Candidate], share: float, draws: int = 4) -> Verdict:
    """Widths that differ from layer to layer decide what must follow; equal widths, whether the
    shared config may follow as well.

    Units that do not matter for this input (experts that no token took) prove nothing: others are
    drawn.
    """
    target: Target | Verdict = Verdict(None, "every draw removed nothing")
    for seed in range(0, 100 * draws, 100):
        shares = [share, 0.5] if seed % 200 == 0 else [share / 2, share]
        target = target_of(
            case, [random_cut(c, shares[i % 2], seed + i) for i, c in enumerate(same)]
        )
        if isinstance(target, Target) or target.moved:
            break
    if isinstance(target, Verdict):
        return target
    verdict = try_recipes(case, target, list(recipes(case.model, target.cuts)))
    if verdict.recipe is None:
        return verdict
    found = needed(case, target, verdict.recipe.attributes)
    even = target_of(case, [random_cut(c, share, seed + i) for i, c in enumerate(same)])
    if isinstance(even, Verdict):
        return even
    return try_recipes(case, even, [Recipe(found, config=True), Recipe(found, config=False)])


def needed(case: Case, target: Target, found: frozenset[Setting]) -> frozenset[Setting]:
    """The recipe without the doubtful sizes that it does not need: a kernel width may equal a rank
    by chance.
    """
    doubtful = {k for k, doubt in sizes_in(case.model, target.cuts).items() if doubt}
    for attribute in sorted(found & doubtful, key=_label):
        without = [Recipe(found - {attribute}, config=False)]
        if try_recipes(case, target, without).recipe is not None:
            found -= {attribute}
    return found


def _label(setting: Setting) -> tuple[str, str]:
    return setting.owner, f"config.{setting.name}" if setting.in_config else setting.name


def try_recipes(case: Case, target: Target, options: Sequence[Recipe], tries: int = 150) -> Verdict:
    """Simplest first, until removal equals the reference, and the parameters fall by the slices'
    sizes.
    """
    reason, stale = "", list[str]()
    for recipe in options[:tries]:
        small = duplicate(case.model)
        shrink(small, case.everything, target.cuts, {target.cuts[0].candidate.pattern: recipe})
        if sum(p.numel() for p in small.parameters()) != target.parameters:
            return Verdict(None, "the parameter count does not fall by what the slices hold")
        try:
            off = _removal_error(case, small, target)
        except ERRORS as e:
            reason = reason or in_short(e, 100)
            continue
        if not off < TOLERANCE:
            reason = f"removal differs from zeroing by {off:.1e}"
            continue
        differs = cache_difference(small, case.inputs) if case.caches else None
        if differs is None:
            return Verdict(recipe)
        stale.append(differs)
        if len(stale) == STALE:
            break
    if stale:
        reason = f"removal equals zeroing, but not when generating with a cache: {stale[0]}"
    return Verdict(None, reason)


def _removal_error(case: Case, small: nn.Module, target: Target) -> float:
    """How far a pruned model is off, relative; with its own attention and expert code too, where
    plain code is right.
    """
    off = _difference(run(small, case.inputs), target.logits)
    if off < TOLERANCE and restore_own_code(small):
        set_sizes(small, plain_experts(small, target.cuts), own=False)
        off = _difference(run(small, case.inputs), target.logits)
    return off


def _difference(logits: Tensor, reference: Tensor) -> float:
    """The largest, relative to the largest logit of the reference (1 at least)."""
    return float((logits - reference).abs().max()) / max(1.0, float(reference.abs().max()))


def count_after(model: nn.Module, cuts: Sequence[Cut]) -> int:
    """Parameters that are left, counted from what the slices hold."""
    keep = to_keep(model, [c.units for c in cuts])
    total = 0
    for name, p in model.named_parameters():
        n = p.numel()
        for axis, index in keep.get(name, {}).items():
            n = n // p.shape[axis] * len(index)
        total += n
    lost = [model.get_submodule(path) for c in cuts for path in c.units.lost_modules]
    return total - sum(p.numel() for module in lost for p in module.parameters())
