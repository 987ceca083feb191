"""What a family of units is, found without names: residual channels, heads, neurons, or other
channels inside a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import nn

from prunekit.graph.block_lists import block_lists, block_of
from prunekit.graph.solve import Family, Solution


@dataclass
class TypedFamily:
    """A family with its kind, and the block it is in (None: it runs through the network).
    `alternatives`: other families of the same tensors.
    """

    kind: str
    family: Family
    block: tuple[str, int] | None
    alternatives: Sequence[Family] = ()
    modules: tuple[str, ...] = ()


class LeftAlone(NamedTuple):
    """What is not pruned, and why."""

    place: str
    reason: str


def parent(model: nn.Module, name: str, block: tuple[str, int] | None) -> str:
    """The module that a tensor works for: `h.0.attn` for `h.0.attn.c_proj.weight` and for
    `h.0.attn.scale`; never a whole block.
    """
    path = name.rpartition(".")[0]
    if any(True for _ in model.get_submodule(path).children()):
        return path
    above = path.rpartition(".")[0]
    return path if block is not None and len(above) <= len(f"{block[0]}.{block[1]}") else above


Blocks = dict[int, set[tuple[str, int] | None]]
"""id of a family -> the blocks that its tensors are in, None for those outside of all."""


def type_families(
    model: nn.Module, solution: Solution, families: list[Family]
) -> tuple[list[TypedFamily], list[LeftAlone]]:
    """Kinds for what can be pruned, and what was found but refused."""
    lists = block_lists(model)
    for f in families:
        f.names = tuple((solution.axis(a).name, solution.axis(a).dim) for a in f.axes)
    refused = [
        LeftAlone(_place(f), f"{f.n} units pass through an op without a rule")
        for f in families
        if "opaque" in f.flags and len(f.names) > 1
    ]
    good = [f for f in families if "opaque" not in f.flags]
    blocks: Blocks = {id(f): {block_of(n, lists) for n, _ in f.names} for f in good}
    hidden = _hidden(good, blocks)
    taken = {c for u in hidden.units for c in u} if hidden else set()
    rest = [
        f
        for f in good
        if f is not hidden and len(f.names) > 1 and not any(set(u) & taken for u in f.units)
    ]
    experts = find_experts(model, solution, families, lists)
    routed = [set(u) for t in experts for u in t.family.units]
    local = [f for f in rest if len(blocks[id(f)]) == 1 and None not in blocks[id(f)]]
    local = [f for f in local if not any(set(f.units[0]) <= u for u in routed)]
    batch = solution.flagged.get("batch", set())
    slabs = [
        f for f in rest if all(set(u) & batch for u in f.units) and not _expert_axis(solution, f)
    ]
    heads = _one_per_module(slabs)
    out = [TypedFamily("hidden", hidden, None)] if hidden else []
    for f, others in heads:
        block = next(iter(blocks[id(f)])) if len(blocks[id(f)]) == 1 else None
        out.append(TypedFamily("heads", f, block, others))
    channels = [f for f in local if not any(f is s for s in slabs)]
    mixers = [f for f, _ in heads] + [f for f in local if "convolved" in f.flags]
    for f, inside in _channels(model, solution, channels, [f for f, _ in heads], mixers):
        kind = "neurons" if "activated" in f.flags and not inside else "inner"
        out.append(TypedFamily(kind, f, next(iter(blocks[id(f)]))))
    return out + experts, refused


def _channels(
    model: nn.Module,
    solution: Solution,
    families: list[Family],
    heads: list[Family],
    mixers: list[Family],
) -> list[tuple[Family, bool]]:
    """Families of single channels, and whether each is inside a module that mixes tokens."""
    lists = block_lists(model)
    rank: dict[str, int] = {}
    for axis in solution.labels.axes:
        rank[axis.name] = max(rank.get(axis.name, 0), axis.dim + 1)
    names = [n for f in mixers for n, _ in f.names]
    owners = {parent(model, n, block) for n in names if (block := block_of(n, lists))}
    in_matrix = set(solution.in_matrix)
    shared = {n for f in heads for n, _ in f.names}
    out = []
    for f in families:
        inside = any(n in shared or any(n.startswith(o + ".") for o in owners) for n, _ in f.names)
        crossed = any(set(u) & in_matrix for u in f.units) and (inside or not heads)
        if not crossed and sum(rank[n] > 1 for n, _ in f.names) > 1:
            out.append((f, inside))
    return _minimal(out)


def find_experts(
    model: nn.Module,
    solution: Solution,
    families: list[Family],
    lists: dict[str, int],
) -> list[TypedFamily]:
    """Rows of a router, found by a top-k over them, joined with whatever comes in as many pieces
    near it: slabs of weights, or modules.

    A router that picks groups of experts first reads its rows as a table of groups: a unit is one
    expert of every group, so that all groups keep the same number.
    """
    order = solution.flagged.get("order", set())
    out = []
    for router in families:
        block = block_of(router.names[0][0], lists)
        if block is None or not all(set(u) & order for u in router.units) or _adjacent(router):
            continue
        scope, root = router.names[0][0].rpartition(".")[0], f"{block[0]}.{block[1]}"
        while scope.startswith(root):
            found = _experts_in(scope, model, solution, families, router)
            if found is not None:
                slabs, modules = found
                joined = _joined([router, *slabs])
                out.append(TypedFamily("experts", joined, block, modules=modules))
                break
            scope = scope.rpartition(".")[0]
    return out


def _rows(router: Family) -> np.ndarray:
    """(U, W) rows of a router that each unit owns."""
    return next(iter(router.axes.values()))


def _adjacent(router: Family) -> bool:
    """Whether a unit is a whole group of experts, which lie side by side."""
    rows = _rows(router)
    return rows.shape[1] > 1 and bool((np.diff(rows, axis=1) == 1).all())


def _experts_in(
    scope: str, model: nn.Module, solution: Solution, families: list[Family], router: Family
) -> tuple[list[Family], tuple[str, ...]] | None:
    """Slabs of weights inside a module that go with a router's rows, or modules that do; None where
    neither is there.
    """
    order, batch = (solution.flagged.get(k, set()) for k in ("order", "batch"))
    experts = _rows(router).size
    first = [
        f
        for f in families
        if f is not router and all(n.startswith(scope + ".") and d == 0 for n, d in f.names)
    ]
    slabs = [
        f
        for f in first
        if f.n == experts
        and not any(set(u) & order for u in f.units)
        and (_expert_axis(solution, f) or not any(set(u) & batch for u in f.units))
    ]
    one = experts == router.n
    fewer = [f for f in first if one and f.n < experts <= 2 * f.n and _expert_axis(solution, f)]
    listed = [
        n
        for n, m in model.named_modules()
        if one and n.startswith(scope + ".") and isinstance(m, nn.ModuleList) and len(m) == experts
    ]
    if not (slabs or listed or fewer or _expert_axis(solution, router)):
        return None
    modules = [f"{listed[0]}.{i}" for i in range(router.n)] if listed and not slabs else []
    return [_regrouped(f, _rows(router)) for f in (*slabs, *fewer)], tuple(modules)


def _regrouped(f: Family, rows: np.ndarray) -> Family:
    """Experts put together as the router's rows `(U, W)` are."""
    if rows.shape[1] == 1:
        return f
    units = [tuple(sorted({c for e in row for c in f.units[e]})) for row in rows]
    axes = {a: np.sort(v[rows].reshape(len(rows), -1), axis=1) for a, v in f.axes.items()}
    return Family(units, axes, f.flags, f.names)


def _joined(families: list[Family]) -> Family:
    """Unit u of each, together; where some have fewer units (experts with weights, which come
    before those without), so many.
    """
    n = min(f.n for f in families)
    units = [tuple(sorted(set().union(*(f.units[u] for f in families)))) for u in range(n)]
    axes = {a: index[:n] for f in families for a, index in f.axes.items()}
    names = tuple(n for f in families for n in f.names)
    return Family(units, axes, frozenset().union(*(f.flags for f in families)), names)


def _place(f: Family) -> str:
    name, dim = f.names[0]
    return f"{name} axis {dim}"


def _hidden(good: list[Family], blocks: dict[int, set[tuple[str, int] | None]]) -> Family | None:
    """The family that reaches the most blocks, then the most tensors."""
    wide = [
        f for f in good if len(f.names) > 2 and ("embedding" in f.flags or len(blocks[id(f)]) > 1)
    ]
    return max(
        wide,
        key=lambda f: (len(blocks[id(f)] - {None}), len(f.names), "embedding" in f.flags, f.n),
        default=None,
    )


def _expert_axis(solution: Solution, f: Family) -> bool:
    """Whether the units enumerate the first axis of 3-D weights."""
    deep = {a.name for a in solution.labels.axes if a.dim == 2}
    return any(
        n in deep and d == 0 and idx.shape[1] == 1
        for (n, d), idx in zip(f.names, f.axes.values(), strict=True)
    )


def _one_per_module(slabs: list[Family]) -> list[tuple[Family, list[Family]]]:
    """Among families that share tensors the one that reaches most of them (whole kv groups, not
    single query heads), and the others.
    """
    clusters: list[tuple[set[str], list[Family]]] = []
    for f in slabs:
        names, members = {n for n, _ in f.names}, [f]
        for cluster in [c for c in clusters if c[0] & names]:
            clusters.remove(cluster)
            names |= cluster[0]
            members = cluster[1] + members
        clusters.append((names, members))
    out = []
    for _, members in clusters:
        best = max(members, key=lambda f: (len(f.names), -f.n))
        out.append((best, sorted((f for f in members if f is not best), key=lambda f: -f.n)))
    return out


def _minimal(channels: list[tuple[Family, bool]]) -> list[tuple[Family, bool]]:
    """Families no unit of which contains a unit of another."""
    out = []
    for f, inside in channels:
        unit = set(f.units[0])
        if not any(
            g is not f and any(set(u) < unit for u in g.units[:1] + g.units[-1:])
            for g, _ in channels
        ):
            out.append((f, inside))
    return out
