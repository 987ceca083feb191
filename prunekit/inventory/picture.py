"""A picture of one block: its tensors as boxes from top to bottom, each group a line down the page
with a dot at every axis that it shares.

Drawn with the standard library: the layout is a table, and no library of Python's lays out such a
picture without a binary beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from prunekit.errors import ConfigError
from prunekit.inventory.drawing import Drawing, Row
from prunekit.inventory.facts import Inventory, Part
from prunekit.inventory.fold import Alike, Stack, braces, stacks, within


def svg(found: Inventory, block: int | None = None) -> str:
    """The picture of one block and of the network's groups that pass through it. Raises ConfigError
    for a block that there is not.
    """
    wide, blocks = stacks(found.entries)
    if not blocks:
        raise ConfigError(f"groups: {found.kind} has no block with a group of its own to draw")
    stack, path = chosen(blocks, block)
    own = [Alike([e for e in a.entries if e.block == path]) for a in stack.alike]
    through = [a for a in wide if any(p.names[0].startswith(path + ".") for p in a.first.parts)]
    lanes = [*through, *own]
    return Drawing(found.title or found.kind, path, lanes, rows(lanes, path)).text()


def chosen(blocks: Sequence[Stack], block: int | None) -> tuple[Stack, str]:
    """The stack and the path of the block with that number; by default the first one of the most
    common make. Raises ConfigError for a number that none has.
    """
    if block is None:
        stack = max(blocks, key=lambda s: len(s.blocks))
        return stack, stack.blocks[0]
    there: dict[int, tuple[Stack, str]] = {}
    for stack in blocks:
        for e in (e for alike in stack.alike for e in alike.entries):
            if e.group.layer is not None and e.block:
                there.setdefault(e.group.layer, (stack, e.block))
    if block not in there:
        raise ConfigError(
            f"groups: no block {block} with groups of its own; there are {min(there)} to "
            f"{max(there)}"
        )
    return there[block]


def rows(lanes: Sequence[Alike], path: str) -> list[Row]:
    """The block's tensors, about in the order of the traced forward; of those that are alike
    (experts) the first.
    """
    many = {
        one[0].names[0]: [p.names[0] for p in one]
        for a in lanes
        if len(a.entries) > 1
        for one in zip(*(e.parts for e in a.entries))
    }
    hidden = {name for names in many.values() for name in names[1:]} - set(many)
    order: list[str] = []
    needs: dict[str, set[str]] = {}
    held: dict[str, dict[int, list[Part]]] = {}
    for i, a in enumerate(lanes):
        mine = [
            p
            for p in a.first.parts
            if p.names[0].startswith(path + ".") and p.names[0] not in hidden
        ]
        merge(order, [p.names[0] for p in mine])
        for p in mine:
            held.setdefault(p.names[0], {}).setdefault(i, []).append(p)
        for earlier, later in pairwise(p.names[0] for p in mine):
            if earlier != later:
                needs.setdefault(later, set()).add(earlier)
    return [
        Row(within(braces(many.get(n, [n])), path), next(iter(held[n].values()))[0], held[n])
        for n in topological_order(order, needs)
    ]


def merge(order: list[str], more: Sequence[str]) -> None:
    """Put the names of `more` that are new into `order`, each behind the one before it, the first
    ones before what follows them.
    """
    at = next((order.index(n) for n in more if n in order), len(order))
    for name in more:
        if name not in order:
            order.insert(at, name)
        at = order.index(name) + 1


def topological_order(order: Sequence[str], needs: dict[str, set[str]]) -> list[str]:
    """The order changed where a group's own order asks for it."""
    waiting, out = list(order), list[str]()
    while waiting:
        following = next((n for n in waiting if needs.get(n, set()) <= set(out)), waiting[0])
        waiting.remove(following)
        out.append(following)
    return out
