"""What is alike told once: groups that differ in numbers only, blocks that hold the same groups,
names as `layers.{0..29}.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from prunekit.inventory.facts import Entry, Part

Leaf = tuple[Part, list[str]]
"""A member and the names of all that are alike, itself included."""


@dataclass(frozen=True)
class Alike:
    """Groups of one make: same kind, units, sizes and members but for the numbers in
    their names.
    """

    entries: list[Entry]

    @property
    def first(self) -> Entry:
        return self.entries[0]

    @property
    def name(self) -> str:
        return braces([e.group.name for e in self.entries])

    def leaves(self, whole: bool = False) -> list[Leaf]:
        """The members, each with its fellows in the other groups; several of one group that differ
        in numbers only are one, unless `whole`.

        Names are those inside the block.
        """
        rows: dict[Hashable, list[str]] = {}
        first: dict[Hashable, Part] = {}
        for e in self.entries:
            for p in e.parts:
                name = within(p.names[0], e.block)
                key = (name if whole else masked(name), *made(p))
                first.setdefault(key, p)
                rows.setdefault(key, []).append(name)
        return [(first[key], names) for key, names in rows.items()]

    def modules(self) -> list[str]:
        """The whole modules that are units, by their names inside the block."""
        return [within(m, e.block) for e in self.entries for m in e.group.modules]


def within(name: str, block: str | None) -> str:
    """A name without the path of the block."""
    return name.removeprefix(f"{block}.") if block else name


@dataclass(frozen=True)
class Stack:
    """Blocks that hold the same groups."""

    blocks: list[str]
    alike: list[Alike]


def masked(name: str) -> str:
    """The name without its numbers."""
    return re.sub(r"\d+", "#", name)


def made(p: Part) -> tuple[Hashable, ...]:
    """What two members must share to be told as one."""
    return p.axis, p.shape, p.rule, p.buffer, len(p.names)


def make(e: Entry) -> tuple[Hashable, ...]:
    """What two groups must share to be told as one."""
    g = e.group
    return (
        g.kind,
        masked(g.name),
        g.units,
        e.each,
        e.least,
        tuple((masked(p.names[0]), *made(p)) for p in e.parts),
    )


def stacks(entries: Iterable[Entry], whole: bool = False) -> tuple[list[Alike], list[Stack]]:
    """The network's own groups, then its blocks, alike ones together; `whole` folds nothing."""
    wide = [Alike([e]) for e in entries if e.block is None]
    blocks: dict[str, list[Entry]] = {}
    for e in entries:
        if e.block is not None:
            blocks.setdefault(e.block, []).append(e)
    if whole:
        return wide, [
            Stack([path], [Alike([e]) for e in inside]) for path, inside in blocks.items()
        ]
    kinds: dict[Hashable, list[str]] = {}
    for path, inside in blocks.items():
        kinds.setdefault((masked(path), tuple(map(make, inside))), []).append(path)
    out = []
    for paths in kinds.values():
        together: dict[Hashable, list[Entry]] = {}
        for path in paths:
            for e in blocks[path]:
                together.setdefault(make(e), []).append(e)
        out.append(Stack(paths, [Alike(es) for es in together.values()]))
    return wide, out


def braces(names: Sequence[str]) -> str:
    """`layers.{0..29}.weight` for names that differ in numbers only; where the numbers do not come
    in all combinations, the first and how many.
    """
    names = list(dict.fromkeys(names))
    numbers = [tuple(map(int, re.findall(r"\d+", n))) for n in names]
    if len({masked(n) for n in names}) > 1:
        return f"{names[0]} ... ({len(names)})"
    columns = [sorted(set(column)) for column in zip(*numbers)]
    if prod(map(len, columns)) != len(names):
        return f"{names[0]} ... ({len(names)})"
    column = iter(columns)
    return re.sub(r"\d+", lambda _: spans(next(column)), names[0])


def spans(numbers: Sequence[int]) -> str:
    """`7`, `{0..3}`, `{0,2}`, `{0..2,5}`: ascending numbers, stretches of three and
    more with dots.
    """
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    texts = [f"{p[0]}..{p[-1]}" if len(p) > 2 else ",".join(map(str, p)) for p in parts]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"
