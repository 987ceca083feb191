"""What a user wants to keep, checked; the slices that go; and setting them to zero."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.types import Group, Kept, Member, tensor_of

Keep = dict[str, dict[int, Tensor]]
"""tensor name -> axis -> indices that stay, ascending."""


@dataclass(frozen=True, eq=False)
class KeptUnits:
    """Which units of a group stay.

    masks: one (U,) bool tensor for each member, in their order; a single one where the group has no
        members (blocks). All keep equally many units.
    """

    group: Group
    masks: tuple[Tensor, ...]

    @staticmethod
    def everywhere(group: Group, mask: Tensor) -> KeptUnits:
        """The same units at every member."""
        return KeptUnits(group, (mask,) * max(1, len(group.members)))

    @property
    def mask(self) -> Tensor:
        """(U,) bool: that of the first member, of the arguments and of the modules."""
        return self.masks[0]

    @property
    def removed(self) -> int:
        """How many units go."""
        return int((~self.mask).sum())

    @property
    def lost_modules(self) -> list[str]:
        """The modules (experts in a ModuleList, blocks) that go."""
        gone = (~self.mask).nonzero()[:, 0].tolist()
        return [self.group.modules[i] for i in gone] if self.group.modules else []

    def slices(self) -> Iterator[tuple[Member, Tensor]]:
        """Members with the indices that go, ascending."""
        for member, mask in zip(self.group.members, self.masks):
            yield member, member.index[~mask].reshape(-1).sort().values


def checked(groups: Sequence[Group], kept: Kept, least: dict[str, int]) -> list[KeptUnits]:
    """What `kept` says of groups and of their parts (`Group.parts`).

    Raises ConfigError for an unknown name, a mask of the wrong shape, an emptied group, or parts
    that are not all there or keep unequal counts.
    """
    whole: dict[str, tuple[Group, Sequence[int]]] = {
        g.name: (g, range(max(1, len(g.members)))) for g in groups
    }
    parts = {part.name: (g, (i,)) for g in groups for i, part in enumerate(g.parts)}
    found: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, mask in kept.items():
        group, members = {**parts, **whole}.get(name, (None, ()))
        if group is None:
            raise ConfigError(f"no group called {name!r}. There are: {', '.join(whole) or 'none'}")
        if mask.dtype != torch.bool or tuple(mask.shape) != group.shape:
            raise ConfigError(
                f"kept[{name!r}] must be a bool tensor of shape {group.shape}, got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        if int(mask.sum()) < least.get(group.name, 1):
            raise ConfigError(
                f"kept[{name!r}] keeps {int(mask.sum())} of {group.units} units of {group.name}; "
                f"at least {least.get(group.name, 1)} must stay"
            )
        found[group.name].update(dict.fromkeys(members, mask.cpu()))
    return [_complete(whole[name][0], masks) for name, masks in found.items()]


def _complete(group: Group, masks: dict[int, Tensor]) -> KeptUnits:
    """Raises ConfigError where parts lack members, or keep unequal counts."""
    counts = sorted({int(m.sum()) for m in masks.values()})
    missing = [part.name for i, part in enumerate(group.parts) if i not in masks]
    if len(counts) > 1 or missing:
        raise ConfigError(
            f"{group.name} is split: every member needs a mask with the same count; counts "
            f"{counts}, missing {missing}"
        )
    return KeptUnits(group, tuple(masks[i] for i in sorted(masks)))


def to_keep(model: nn.Module, cuts: Iterable[KeptUnits]) -> Keep:
    """Indices that stay, for every tensor and axis that loses some."""
    drop: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for units in cuts:
        for m, index in units.slices():
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


def zero_slices(model: nn.Module, cuts: Iterable[KeptUnits]) -> None:
    """Set the units' slices of parameters to zero, and all of the modules that go with them.
    Buffers stay: they hold constants, which zeroed parameters make harmless.
    """
    with torch.no_grad():
        for units in cuts:
            for m, index in units.slices():
                t = tensor_of(model, m.param)
                if isinstance(t, nn.Parameter):
                    t.index_fill_(m.axis, index.to(t.device), 0)
            for path in units.lost_modules if units.group.members else ():
                for p in model.get_submodule(path).parameters():
                    p.zero_()


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
