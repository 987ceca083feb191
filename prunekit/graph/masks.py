"""What a user asked to keep, checked; the slices that go; and setting them to zero."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.types import Group, Kept, Member, tensor_of

Keep = dict[str, dict[int, Tensor]]
"""tensor name -> axis -> indices that stay, ascending."""
Masks = dict[tuple[str, int], Tensor]
"""(parameter, axis) -> bool mask over a group's units."""


def checked(
    groups: Sequence[Group], kept: Kept, least: dict[str, int]
) -> list[tuple[Group, Masks]]:
    """(group, (parameter, axis) -> bool mask over its units), for plain names and for split names
    `GROUP/PARAM:AXIS`.

    Raises ConfigError for an unknown name, a mask of the wrong shape, an emptied group, or split
    masks of unequal counts.
    """
    by_name = {g.name: g for g in groups}
    asked: dict[str, Masks] = defaultdict(dict)
    for name, mask in kept.items():
        stem, _, place = name.partition("/")
        if stem not in by_name:
            raise ConfigError(
                f"no group called {stem!r}. There are: {', '.join(by_name) or 'none'}"
            )
        group = by_name[stem]
        if mask.dtype != torch.bool or tuple(mask.shape) != group.shape:
            raise ConfigError(
                f"kept[{name!r}] must be a bool tensor of shape {group.shape}, got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        if int(mask.sum()) < least.get(stem, 1):
            raise ConfigError(
                f"kept[{name!r}] keeps {int(mask.sum())} of {group.units} units of {stem}; at "
                f"least {least.get(stem, 1)} must stay"
            )
        places = {(m.param, m.axis): mask.cpu() for m in group.members}
        if place:
            param, _, axis = place.rpartition(":")
            if not axis.isdigit() or (param, int(axis)) not in places:
                raise ConfigError(
                    f"{stem} has no member {place!r}. There are: "
                    f"{', '.join(f'{p}:{a}' for p, a in places)}"
                )
            places = {(param, int(axis)): mask.cpu()}
        asked[stem].update(places or {("", -1): mask.cpu()})
    for name, masks in asked.items():
        counts = {int(m.sum()) for m in masks.values()}
        missing = [
            f"{m.param}:{m.axis}" for m in by_name[name].members if (m.param, m.axis) not in masks
        ]
        if len(counts) > 1 or missing:
            raise ConfigError(
                f"{name} is split: every member needs a mask with the same count; counts "
                f"{sorted(counts)}, missing {missing}"
            )
    return [(by_name[name], masks) for name, masks in asked.items()]


def gone(group: Group, masks: Masks) -> Iterable[tuple[Member, Tensor]]:
    """Members with the indices that go, ascending."""
    for m in group.members:
        yield m, m.index[~masks[m.param, m.axis]].reshape(-1).sort().values


def to_keep(model: nn.Module, asked: Iterable[tuple[Group, Masks]]) -> Keep:
    drop: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for group, masks in asked:
        for m, index in gone(group, masks):
            drop[m.param][m.axis].append(index)
    out: Keep = {}
    for name, axes in drop.items():
        shape = tensor_of(model, name).shape
        out[name] = {}
        for axis, parts in axes.items():
            stays = torch.ones(shape[axis], dtype=torch.bool)
            stays[torch.cat(parts)] = False
            out[name][axis] = stays.nonzero()[:, 0]
    return out


# ---- zero


def zero_slices(model: nn.Module, asked: Iterable[tuple[Group, Masks]]) -> None:
    """Set the units' slices of parameters to zero. Buffers stay: they hold constants, which zeroed
    parameters make harmless.
    """
    with torch.no_grad():
        for group, masks in asked:
            for m, index in gone(group, masks):
                t = tensor_of(model, m.param)
                if isinstance(t, nn.Parameter):
                    t.index_fill_(m.axis, index.to(t.device), 0)
            if group.modules and group.members:
                for i in lost_modules(group, masks):
                    for p in model.get_submodule(group.modules[i]).parameters():
                        p.zero_()


def lost_modules(group: Group, masks: Masks) -> list[int]:
    """Numbers of the modules (experts in a ModuleList) that go."""
    return (~next(iter(masks.values()))).nonzero()[:, 0].tolist() if group.modules else []


def zero_block(model: nn.Module, path: str) -> None:
    """Zero a block's parameters, save those that other blocks share."""
    block = model.get_submodule(path)
    shared = {
        id(p)
        for n, m in model.named_modules()
        if n != path and not n.startswith(path + ".")
        for p in m.parameters(recurse=False)
    }
    with torch.no_grad():
        for p in block.parameters():
            if id(p) not in shared:
                p.zero_()


def bypass(block: nn.Module) -> Any:
    """Make a block hand on its input: for blocks that all-zero parameters do not turn into the
    identity.
    """

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return with_stream(output, stream_in(args, kwargs))

    return block.register_forward_hook(skip, with_kwargs=True)


def stream_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream that a block is given: its first tensor."""
    return next(t for t in [*args, *kwargs.values()] if isinstance(t, Tensor))


def stream_out(output: Any) -> Tensor:
    """The residual stream that a block returns: its output, or the first of several."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def with_stream(output: Any, stream: Tensor) -> Any:
    """A block's output with another residual stream in it."""
    if isinstance(output, Tensor):
        return stream
    if hasattr(output, "_fields"):
        return output._replace(**{output._fields[0]: stream})
    return (stream, *output[1:])
