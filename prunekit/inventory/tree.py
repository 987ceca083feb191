"""The inventory as a tree for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.tree import Tree

from prunekit.inventory.facts import Entry, Inventory
from prunekit.inventory.fold import Alike, braces, masked, stacks, within
from prunekit.inventory.rule import in_words

COLOURS = {
    "hidden": "blue",
    "heads": "yellow",
    "neurons": "green",
    "experts": "magenta",
    "blocks": "cyan",
    "inner": "red",
}


def tree(found: Inventory, whole: bool = False) -> Tree:
    """Alike groups and blocks folded, unless `whole`."""
    wide, blocks = stacks(found.entries, whole)
    proof = "removal proven on a small version" if found.proven else "nothing proven"
    heading = f"{found.title}: {found.kind}" if found.title else found.kind
    root = Tree(
        f"[bold]{escape(heading)}[/], {found.params:,} parameters, {len(found.entries)} groups, "
        f"{proof}\n"
        "[dim]unit u of a group owns, along the axis of each tensor, the indices after the colon[/]"
    )
    for alike in wide:
        group_node(root, alike, whole)
    for stack in blocks:
        many = f": {len(stack.blocks)} blocks alike" if len(stack.blocks) > 1 else ""
        node = root.add(f"[bold]{escape(braces(stack.blocks))}[/]{many}")
        for alike in stack.alike:
            group_node(node, alike, whole)
    reasons(root, found, whole)
    return root


def group_node(above: Tree, alike: Alike, whole: bool) -> None:
    """One line for the group, one for each member: tensor, shape, axis, the indices of unit u."""
    e = alike.first
    colour = COLOURS.get(e.group.kind, "white")
    node = above.add(f"[{colour}]{escape(alike.name)}[/]: {escape(size(e) + left_out(alike))}")
    if e.group.modules:
        node.add(escape(f"{braces(alike.modules())}  the whole module"))
    leaves = alike.leaves(whole)
    named = [
        " = ".join([braces(names), *(within(n, e.block) for n in p.names[1:])])
        for p, names in leaves
    ]
    shapes = [" x ".join(map(str, p.shape)) for p, _ in leaves]
    wide = max(map(len, named), default=0), max(map(len, shapes), default=0)
    for (p, _), name, shape in zip(leaves, named, shapes, strict=True):
        note = "  (a buffer)" if p.buffer else ""
        node.add(
            escape(f"{name:{wide[0]}}  {shape:{wide[1]}}  axis {p.axis}: {in_words(p.rule)}{note}")
        )


def size(e: Entry) -> str:
    """`8 units of 221,184 parameters, at least 2 must stay`."""
    each = f"{e.each[0]:,}" if len(e.each) == 1 else f"{min(e.each):,} to {max(e.each):,}"
    least = f", at least {e.least} must stay" if e.least > 1 else ""
    return f"{e.group.units} units of {each} parameters{least}"


def left_out(alike: Alike) -> str:
    """Which of the groups a run with these overrides would leave alone, and what says so."""
    by: dict[str, list[str]] = {}
    for e in alike.entries:
        if e.left_out_by:
            by.setdefault(e.left_out_by, []).append(e.group.name)
    every = "it" if len(alike.entries) == 1 else "all"
    parts = [
        f"{what} leaves {f'{every} out' if len(n) == len(alike.entries) else f'out {braces(n)}'}"
        for what, n in by.items()
    ]
    return f" [{'; '.join(parts)}]" if parts else ""


def reasons(root: Tree, found: Inventory, whole: bool) -> None:
    """What was left alone, what never ran, and what no unit owns a part of."""
    left: dict[tuple[str, str], list[str]] = {}
    for place, reason in found.left:
        left.setdefault((place if whole else masked(place), reason), []).append(place)
    node = root.add("[bold]left alone[/]" + ("" if left else ": nothing"))
    for (_, reason), places in left.items():
        node.add(escape(f"{braces(places)}: {reason}"))
    for heading, names in (
        ("never touched by the traced run", found.untouched),
        ("in no group", found.loose),
    ):
        if names:
            node = root.add(f"[bold]{heading}[/]")
            for line in folded(names, whole):
                node.add(escape(line))


def folded(names: Sequence[str], whole: bool) -> list[str]:
    if whole:
        return list(names)
    alike: dict[str, list[str]] = {}
    for n in names:
        alike.setdefault(masked(n), []).append(n)
    return [braces(of) for of in alike.values()]
