"""What discovery found in a model, as plain data: every group with its members and index rules,
what was left alone, what never ran.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekit.architecture.sizes import Sizes
from prunekit.graph.block_lists import block_lists, block_of
from prunekit.graph.discovery import UNTOUCHED, discovery
from prunekit.graph.unit_kinds import LeftAlone
from prunekit.inventory.rule import Rule, as_data, rule_of
from prunekit.types import Group, tensor_of


@dataclass(frozen=True)
class Part:
    """One member: the tensor under all its names, its shape, and which indices of `axis` are whose.
    Buffers are not counted as parameters.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    axis: int
    rule: Rule
    buffer: bool


@dataclass(frozen=True)
class Entry:
    """One group. `each`: parameters that go with one unit; units differ where there are several
    numbers. `least`: units that must stay.

    `block` is the path of the decoder block that it lies in, None for the network's; `left_out_by`
    says which choice of the run leaves it alone.
    """

    group: Group
    parts: tuple[Part, ...]
    each: tuple[int, ...]
    least: int
    block: str | None
    left_out_by: str | None


@dataclass(frozen=True)
class Inventory:
    """A model's groups, and all else that discovery has to say about it. `loose`: parameters that
    ran and of which no unit owns a part.
    """

    title: str
    kind: str
    params: int
    proven: bool
    entries: list[Entry]
    left: list[LeftAlone]
    untouched: list[str]
    loose: list[str]


def inventory(
    model: nn.Module,
    title: str = "",
    *,
    verify: bool = True,
    exclude: Callable[[list[Group]], list[Group]] | None = None,
    excluded_by: str = "exclude",
    kinds: Sequence[str] = (),
    kinds_by: str = "pruner",
) -> Inventory:
    """What there is in `model`, on whatever device: no weight is read. `verify` proves every group
    on a small version first (seconds).

    Groups of other kinds than `kinds` (empty: all), and those that `exclude` takes away, are told
    with the name of what spares them.
    """
    found = discovery(model, verify)
    groups, lists = found.groups, block_lists(model)
    remain = {g.name for g in (exclude(groups) if exclude and groups else groups)}

    def left_out_by(g: Group) -> str | None:
        if kinds and g.kind not in kinds:
            return kinds_by
        return None if g.name in remain else excluded_by

    names: dict[int, list[str]] = defaultdict(list)
    for name, p in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        names[id(p)].append(name)
    sizes = Sizes(model, groups)
    entries = [
        Entry(
            g,
            parts(model, g, names),
            each(model, g, sizes),
            found.least.get(g.name, 1),
            block_path(g, lists),
            left_out_by(g),
        )
        for g in groups
    ]
    untouched = [place for place, reason in found.left_alone if reason == UNTOUCHED]
    owned = {m.param for g in groups for m in g.members} | set(untouched)
    inside = tuple(f"{x}." for g in groups if g.kind == "experts" for x in g.modules)
    loose = [n for n, _ in model.named_parameters() if n not in owned and not n.startswith(inside)]
    return Inventory(
        title,
        type(model).__name__,
        sizes.total,
        verify,
        entries,
        [one for one in found.left_alone if one.reason != UNTOUCHED],
        untouched,
        loose,
    )


def parts(model: nn.Module, group: Group, names: dict[int, list[str]]) -> tuple[Part, ...]:
    """The members of a group, in its order."""
    out = []
    for m in group.members:
        t = tensor_of(model, m.param)
        own = names.get(id(t), [])
        also = tuple(n for n in own if n != m.param)
        out.append(
            Part(
                (m.param, *also),
                tuple(t.shape),
                m.axis,
                rule_of(m.index),
                not isinstance(t, nn.Parameter),
            )
        )
    return tuple(out)


def each(model: nn.Module, group: Group, sizes: Sizes) -> tuple[int, ...]:
    """Parameters that go when one unit goes alone: one number, or one for each unit where modules
    of different sizes are the units.
    """
    if not group.modules:
        return (sizes.removed({group.name: 1}),)
    whole = [
        sum(p.numel() for p in model.get_submodule(path).parameters()) for path in group.modules
    ]
    beside = sizes.removed({group.name: 1}) - round(sum(whole) / group.units)
    own = tuple(beside + n for n in whole)
    return own[:1] if len(set(own)) == 1 else own


def block_path(group: Group, lists: dict[str, int]) -> str | None:
    """`model.layers.3` for a group of one block."""
    if group.layer is None:
        return None
    place = next((p for m in group.members if (p := block_of(m.param, lists))), None)
    return f"{place[0]}.{place[1]}" if place else None


def as_json(found: Inventory) -> dict[str, Any]:
    """Everything, nothing folded; `index` as `rule.as_data` writes it."""
    return {
        "model": found.title,
        "class": found.kind,
        "parameters": found.params,
        "proven": found.proven,
        "groups": [entry_data(e) for e in found.entries],
        "left_alone": [{"place": place, "reason": reason} for place, reason in found.left],
        "untouched": found.untouched,
        "in_no_group": found.loose,
    }


def entry_data(e: Entry) -> dict[str, Any]:
    members = [
        {
            "tensor": p.names[0],
            "also": list(p.names[1:]),
            "buffer": p.buffer,
            "shape": list(p.shape),
            "axis": p.axis,
            "index": as_data(p.rule),
        }
        for p in e.parts
    ]
    return {
        "name": e.group.name,
        "kind": e.group.kind,
        "layer": e.group.layer,
        "units": e.group.units,
        "parameters_per_unit": e.each[0] if len(e.each) == 1 else list(e.each),
        "least_units": e.least,
        "left_out_by": e.left_out_by,
        "members": members,
        "modules": list(e.group.modules),
    }
