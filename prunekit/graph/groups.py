"""Typed families of a skeleton -> the real model's groups."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from prunekit.graph.block_lists import block_lists, block_of, numbers
from prunekit.graph.family_facts import Argument, Extents, FactFinder
from prunekit.graph.masks import KeptUnits
from prunekit.graph.solve import Family, Solution
from prunekit.graph.unit_kinds import TypedFamily
from prunekit.types import Group, Member

Pattern = tuple[str, frozenset[tuple[str, int]]]
"""What groups that are built alike share: kind, and tensors with the numbers taken out of their
names.
"""


@dataclass
class Candidate:
    """A group together with what removal has to know; `numbers`: attributes that are not sizes;
    `alternatives`: other families for its place.
    """

    group: Group
    pattern: Pattern
    extents: Extents
    norms: list[str]
    arguments: list[Argument]
    least: int = 1
    block: str | None = None
    numbers: frozenset[tuple[str, str]] = frozenset()
    alternatives: list[Candidate] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Cut:
    """A candidate and which of its units stay."""

    candidate: Candidate
    units: KeptUnits

    @staticmethod
    def everywhere(candidate: Candidate, mask: Tensor) -> Cut:
        """The same units at every member."""
        return Cut(candidate, KeptUnits.everywhere(candidate.group, mask))


def pattern_of(kind: str, members: Iterable[tuple[str, int]]) -> Pattern:
    return kind, frozenset((re.sub(r"\d+", "#", name), dim) for name, dim in members)


Rename = Callable[[str], list[str]]
"""A name in the skeleton -> the names in the real model that it represents."""


def candidates(
    solution: Solution,
    typed: list[TypedFamily],
    small: nn.Module,
    representatives: dict[str, list[int]],
    real: nn.Module,
) -> list[Candidate]:
    """Groups of the real model, in the order of its blocks: each real block takes those of the
    block that represents it.
    """
    build = _Builder(solution)

    def everywhere(name: str) -> list[str]:
        return _everywhere(name, small, representatives)

    out, names = [], Counter[str]()
    for t in [t for t in typed if t.block is None]:
        names[t.kind] += 1
        name = t.kind if names[t.kind] == 1 else f"{t.kind}_{names[t.kind] - 1}"
        out.append(build(t, name, None, everywhere))
    local = sorted(
        (t for t in typed if t.block),
        key=lambda t: min(build.order[n] for n, _ in t.family.names),
    )
    layers = _layers(real, typed)
    for path, chosen in representatives.items():
        for i, representative in enumerate(chosen):
            for t in [t for t in local if t.block == (path, representative)]:
                layer, block = layers[path, i], f"{path}.{i}"
                rename = _renaming(f"{path}.{representative}", block)
                out.append(build(t, _local_name(t, local, layer, solution), layer, rename, block))
    not_sizes = numbers(real)
    for candidate in [o for c in out for o in (c, *c.alternatives)]:
        candidate.numbers = not_sizes
    return out


def _layers(real: nn.Module, typed: Sequence[TypedFamily]) -> dict[tuple[str, int], int]:
    """The number under which each block is shown: its own, or among all blocks where the numbers of
    several lists that have units would clash.
    """
    lists = block_lists(real)
    places = [(path, i) for path, n in lists.items() for i in range(n)]
    if len(lists) == 1 or len({t.block[0] for t in typed if t.block}) == 1:
        return {place: place[1] for place in places}
    clash = Counter(i for _, i in places)
    return {place: place[1] if clash[place[1]] == 1 else k for k, place in enumerate(places)}


def _local_name(
    t: TypedFamily, local: Sequence[TypedFamily], layer: int, solution: Solution
) -> str:
    """`neurons.3`; of several of a kind in a block the largest, then `neurons.3.1`; inside expert 5
    `neurons.3.e5`.
    """
    beside = [o for o in local if o.block == t.block]
    first = t.family.names[0][0]
    for modules in [o.modules for o in beside]:
        for k, module in enumerate(modules):
            if first.startswith(module + "."):
                return f"{t.kind}.{layer}.e{k}"
    same = [o for o in beside if o.kind == t.kind]
    same.sort(key=lambda o: -_size(o.family, solution))
    place = next(i for i, o in enumerate(same) if o is t)
    return f"{t.kind}.{layer}" + (f".{place}" if place else "")


def _renaming(here: str, there: str) -> Rename:
    """From the names inside one block to those inside another; others stay."""

    def rename(name: str) -> list[str]:
        inside = name == here or name.startswith(here + ".")
        return [there + name[len(here) :] if inside else name]

    return rename


def _size(f: Family, solution: Solution) -> int:
    """Elements that a family's units own, in matrices of which the other sides are counted as
    labelled.
    """
    sides: dict[str, int] = defaultdict(lambda: 1)
    for axis in solution.labels.axes:
        sides[axis.name] *= axis.size
    return sum(
        sides[solution.axis(a).name] * v.size // solution.axis(a).size for a, v in f.axes.items()
    )


def _everywhere(name: str, small: nn.Module, representatives: dict[str, list[int]]) -> list[str]:
    """All real names that a skeleton's name represents."""
    place = block_of(name, block_lists(small))
    if place is None:
        return [name]
    path, shown = place
    rest = name[len(f"{path}.{shown}") :]
    return [f"{path}.{i}{rest}" for i, kind in enumerate(representatives[path]) if kind == shown]


class _Builder:
    """Makes candidates of families."""

    def __init__(self, solution: Solution):
        self.solution = solution
        self.facts = FactFinder(solution)
        self.order = {name: i for i, name in enumerate(solution.labels.touched)}

    def __call__(
        self, t: TypedFamily, name: str, layer: int | None, rename: Rename, block: str | None = None
    ) -> Candidate:
        """The candidate of a family, with those of its alternatives."""
        made = [self._candidate(t, f, name, layer, rename) for f in (t.family, *t.alternatives)]
        for candidate in made:
            candidate.block = block
        made[0].alternatives = made[1:]
        return made[0]

    def _candidate(
        self, t: TypedFamily, f: Family, name: str, layer: int | None, rename: Rename
    ) -> Candidate:
        read = self.solution.labels.read
        keys = sorted(zip(f.names, f.axes.values()), key=lambda item: self.order[item[0][0]])
        members = [
            Member(real, dim, torch.from_numpy(index.copy()), (n, dim) in read)
            for (n, dim), index in keys
            for real in rename(n)
        ]
        if layer is None:
            members = _by_block(members)
        facts = self.facts(f)
        width = next(iter(f.axes.values())).shape[1]  # experts of a unit: one of every group
        counted = {f.n * width: Counter({width: 1})} if t.kind == "experts" else {}
        extents = {
            real: {**counted, **sizes}
            for scope, sizes in facts.extents.items()
            for real in rename(scope)
        }
        modules = tuple(real for m in t.modules for real in rename(m))
        group = Group(name, t.kind, layer, f.n, tuple(members), modules)
        norms = [real for scope in facts.norms for real in rename(scope)]
        arguments = [replace(a, module=real) for a in facts.arguments for real in rename(a.module)]
        return Candidate(group, pattern_of(t.kind, f.names), extents, norms, arguments, facts.least)


def _by_block(members: list[Member]) -> list[Member]:
    """Members of a network-wide group, block by block where the skeleton's order repeats."""
    numbers = [re.findall(r"\.(\d+)\.", m.param) for m in members]
    inside = [i for i, n in enumerate(numbers) if n]
    outside = [i for i, n in enumerate(numbers) if not n]
    start = inside[0] if inside else len(members)
    order = [
        *(i for i in outside if i < start),
        *sorted(inside, key=lambda i: int(numbers[i][0])),
        *(i for i in outside if i > start),
    ]
    return [members[i] for i in order]
