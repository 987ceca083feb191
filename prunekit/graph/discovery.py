"""`discover`: a model's groups, and what was left alone and why; `zero` and `remove`
act on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from prunekit.graph.block_lists import block_lists, block_of
from prunekit.graph.block_verification import BLOCKS, prove_blocks
from prunekit.graph.gate_hooks import Gate
from prunekit.graph.groups import Candidate, Pattern, candidates
from prunekit.graph.labels import Labels, tensors
from prunekit.graph.model_settings import configs, pick_all_experts
from prunekit.graph.sample_run import ERRORS, TOKENS, inputs_for
from prunekit.graph.skeleton import skeleton
from prunekit.graph.small_model import small_version
from prunekit.graph.solve import Solution
from prunekit.graph.trace import Trace, trace
from prunekit.graph.unit_kinds import LeftAlone, TypedFamily, type_families
from prunekit.graph.verification import Verdict, dense_cache_difference, prove
from prunekit.types import Group


@dataclass
class Discovery:
    """What is known about a model: proven candidates, recipes for removing them, and what was left
    alone.

    `uncached`: why generation with a cache is no part of the proofs (the unpruned model cannot do
    it either); None where it is. `places`: where `gated` multiplies units, once it was used.
    """

    candidates: list[Candidate]
    verdicts: dict[Pattern, Verdict]
    left_alone: list[LeftAlone]
    skip: frozenset[tuple[str, int]] = frozenset()
    blocks: Group | None = None
    uncached: str | None = None
    places: dict[Pattern, Any] = field(default_factory=dict)

    @property
    def groups(self) -> list[Group]:
        return [c.group for c in self.candidates] + ([self.blocks] if self.blocks else [])

    @property
    def least(self) -> dict[str, int]:
        return {c.group.name: c.least for c in self.candidates}


_CACHE: dict[tuple[str, bool], Discovery] = {}
UNTOUCHED = "the traced run never touched it"
CACHE_SIZE = 32
"""How many discoveries are kept, by what they depend on: a model's classes, shapes and settings,
not its weights.
"""


def find_candidates(model: nn.Module, each: int = 1) -> tuple[nn.Module, Discovery]:
    """Trace a skeleton with `each` blocks of a kind and type what it holds; nothing is proven yet.
    Returns the skeleton too.
    """
    small, representatives = skeleton(model, each)
    inputs = inputs_for(small)
    labels, _ = trace(small, inputs)
    skip = token_axes(labels)
    if skip:
        labels, _ = trace(small, inputs, Trace(small, skip))
    labels = with_generation(small, inputs, skip, labels)
    units = with_all_experts(small, inputs, skip, type_units(small, labels))
    found = candidates(units.solution, units.typed, small, representatives, model)
    left = units.refused + [LeftAlone(n, UNTOUCHED) for n in untouched(small, units.labels)]
    touched = units.labels.touched
    used = [path for path in block_lists(model) if any(n.startswith(path + ".") for n in touched)]
    blocks = blocks_of(model, used)
    if blocks is None:
        where = f"{len(used)} lists ({', '.join(used[:4])})"
        left.append(
            LeftAlone("blocks", f"the blocks that ran are in {where}, not in one of two or more")
        )
    return small, Discovery(found, {}, left, skip, blocks)


def untouched(small: nn.Module, labels: Labels) -> list[str]:
    return [
        n
        for n, p in tensors(small)
        if isinstance(p, nn.Parameter) and n not in labels.touched and p.numel() > 1
    ]


def with_generation(
    small: nn.Module, inputs: dict[str, Any], skip: frozenset[tuple[str, int]], first: Trace
) -> Trace:
    """Where a plain run leaves parameters untouched, follow a step of generation too: XLNet asks
    for the next token by a stream of its own.
    """
    prepare, (ids, *others) = getattr(small, "prepare_inputs_for_generation", None), inputs.values()
    if prepare is None or others or not untouched(small, first):
        return first
    try:
        step = {k: v for k, v in prepare(ids, use_cache=False).items() if isinstance(v, Tensor)}
        both, _ = trace(small, inputs, Trace(small, skip))
        trace(small, step, both)
    except ERRORS:
        return first
    return both if len(untouched(small, both)) < len(untouched(small, first)) else first


class TypedUnits(NamedTuple):
    """What a trace comes to: its labels, solved, and the kinds of what can be pruned."""

    labels: Trace
    solution: Solution
    typed: list[TypedFamily]
    refused: list[LeftAlone]

    @property
    def experts(self) -> int:
        """How many families are experts."""
        return sum(t.kind == "experts" for t in self.typed)


def type_units(small: nn.Module, labels: Trace) -> TypedUnits:
    solution = Solution(labels)
    return TypedUnits(labels, solution, *type_families(small, solution, solution.families()))


def with_all_experts(
    small: nn.Module, inputs: dict[str, Any], skip: frozenset[tuple[str, int]], first: TypedUnits
) -> TypedUnits:
    """Where a top-k did not lead to experts in stacked weights, trace again with all experts
    picked: one that no token took has no labels.
    """
    routed = {t.block for t in first.typed if t.kind == "experts" and not t.modules}
    picks = [p for p in first.labels.picks if block_of(p[0], block_lists(small)) not in routed]
    if not picks or not pick_all_experts(small, picks):
        return first
    try:
        again, _ = trace(small, inputs, Trace(small, skip))
    except ERRORS:
        return first
    again.least = first.labels.least
    second = type_units(small, again)
    return second if second.experts >= first.experts else first


def blocks_of(model: nn.Module, used: Sequence[str]) -> Group | None:
    """The blocks as units, where all that ran are in one list."""
    if len(used) != 1 or block_lists(model)[used[0]] < 2:
        return None
    n = block_lists(model)[used[0]]
    return Group("blocks", "blocks", None, n, modules=tuple(f"{used[0]}.{i}" for i in range(n)))


def token_axes(labels: Labels) -> frozenset[tuple[str, int]]:
    """Axes of which the run read as many as there were tokens (or differences of positions): they
    are indexed by position, not by channel.
    """
    out = set()
    for name, axes in labels.touched.items():
        for dim, hit in axes.items():
            n = int(hit.sum())
            if n in (TOKENS, 2 * TOKENS - 1) and n < len(hit) and hit[:n].all():
                out.add((name, dim))
    return frozenset(out)


def discover(model: nn.Module, verify: bool = True) -> list[Group]:
    """Every group of units of the model whose removal is proven (with `verify`) to equal zeroing
    them, on a small model of its kind.

    Works on any device, meta included: no weight is read. What was left alone, and why, is in
    `report(model)`.
    """
    return discovery(model, verify).groups


def discovery(model: nn.Module, verify: bool = True) -> Discovery:
    """What is known about a model, from memory where one of the same classes, shapes and settings
    was discovered before.
    """
    key = (fingerprint(model), verify)
    if key not in _CACHE:
        if verify:  # what a run's check on the meta device found is not traced again
            found = keep_proven(discovery(model, verify=False), *verdicts_for(model))
        else:
            found = find_candidates(model)[1]
        while len(_CACHE) >= CACHE_SIZE:
            del _CACHE[next(iter(_CACHE))]
        _CACHE[key] = found
    return _CACHE[key]


def fingerprint(model: nn.Module) -> str:
    """Equal for models of the same classes, shapes, dtypes and settings."""
    digest = hashlib.blake2b()
    for path, m in model.named_modules():
        settings = [
            (k, v)
            for k, v in vars(m).items()
            if isinstance(v, (int, str, tuple)) and not k.startswith("_")
        ]
        hooks = [
            h
            for h in m._forward_pre_hooks.values()
            if not isinstance(getattr(h, "__self__", h), Gate)
        ]
        digest.update(repr((path, type(m).__qualname__, settings, len(hooks))).encode())
    for name, t in tensors(model):
        digest.update(repr((name, tuple(t.shape), t.dtype)).encode())
    for _, config in configs(model):
        digest.update(repr(config).encode())
    return digest.hexdigest()


def verdicts_for(model: nn.Module) -> tuple[dict[Pattern, Verdict], str | None]:
    """Proofs on a small version of the model with random weights and two blocks of each kind; why
    they leave out the cache, if they do.
    """
    small = small_version(model)
    inputs = inputs_for(small)
    _, known = find_candidates(small, each=2)
    uncached = dense_cache_difference(small, inputs)
    verdicts = prove(small, inputs, known.candidates, known.skip, caches=uncached is None)
    if known.blocks:
        verdicts[BLOCKS] = prove_blocks(small, inputs, known.blocks, caches=uncached is None)
    return verdicts, uncached


def keep_proven(
    found: Discovery, verdicts: dict[Pattern, Verdict], uncached: str | None
) -> Discovery:
    """Keep for each place the first candidate that is proven; say why the others are not."""
    proven = {pattern for pattern, verdict in verdicts.items() if verdict.recipe is not None}
    kept, left = [], list(found.left_alone)
    for c in found.candidates:
        chosen = next((o for o in (c, *c.alternatives) if o.pattern in proven), None)
        if chosen is None:
            none = Verdict(None, "its small version has no such units")
            left.append(LeftAlone(c.group.name, verdicts.get(c.pattern, none).reason))
        else:
            kept.append(chosen)
    blocks = found.blocks
    if blocks and BLOCKS not in proven:
        blocks = None
        left.append(LeftAlone("blocks", verdicts[BLOCKS].reason))
    return Discovery(kept, verdicts, left, found.skip, blocks, uncached)


def verify(model: nn.Module, groups: Sequence[Group]) -> list[tuple[str, bool, str]]:
    """For each of the groups: its name, whether removing its units is proven to equal zeroing them,
    and if not the reason.

    The proof runs on a small version of the model with random weights; the model itself is neither
    run nor changed.
    """
    found = discovery(model, verify=True)
    proven = {g.name for g in found.groups}
    why = dict(found.left_alone)
    return [
        (
            g.name,
            g.name in proven,
            "" if g.name in proven else why.get(g.name, "no such group in this model"),
        )
        for g in groups
    ]


def forget(model: nn.Module) -> None:
    """Drop what is known about models built like this one."""
    for verify in (False, True):
        _CACHE.pop((fingerprint(model), verify), None)


def report(model: nn.Module) -> list[str]:
    """What discovery left alone, one line each: the place and the reason."""
    return [f"{place}: {reason}" for place, reason in discovery(model).left_alone]
