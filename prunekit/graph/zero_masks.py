"""Which elements of a pruned model are zeros that must stay, whatever is trained afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from prunekit.types import Group, Kept, tensor_of


def zero_masks(model: nn.Module, groups: Iterable[Group], kept: Kept) -> dict[str, Tensor]:
    """Parameter name -> bool tensor of its shape, True = free, False = zero for good; in host
    memory.

    groups, kept: those of `Pruned`: single weights, and units of any kind that were set to zero
        where they stand. What was cut out of the model has no element left in it, and gives no
        mask; nor does a buffer, which nothing trains.
    """
    masks: dict[str, Tensor] = {}
    for group in groups:
        if group.name in kept and not kept[group.name].all():
            for name, free in _zeroed(model, group, kept[group.name].cpu()):
                masks[name] = masks[name] & free if name in masks else free
    return masks


def _zeroed(model: nn.Module, group: Group, kept: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The masks of one group: none if its units are no longer in the model."""
    if group.kind == "weights":
        name = group.matrix
        weight = _parameter(model, name)
        if weight is not None and weight.shape == kept.shape:
            yield name, kept
        return
    slices = _slices(model, group, ~kept)
    if slices is None:
        return
    for name, axis, index in slices:
        parameter = model.get_parameter(name)
        yield name, _free(parameter).index_fill_(axis, index, False)
    if not group.modules:
        return
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for unit in (~kept).nonzero()[:, 0].tolist():
        own = _own_parameters(model, group.modules[unit], uses)
        if not any(bool(p.any()) for p in own.values()):
            yield from ((name, ~_free(p)) for name, p in own.items())


def _slices(model: nn.Module, group: Group, gone: Tensor) -> list[tuple[str, int, Tensor]] | None:
    """(parameter, axis, indices) of the units that are gone; None if they were cut out.

    Then an index runs over the end of at least one tensor, namely of every one that holds nothing
    but the group's units along that axis. The others hold weights in the places of the units; so do
    all of them where whole blocks were cut out, and others have their numbers now.
    """
    found = []
    for m in group.members:
        parameter = _parameter(model, m.param)
        if parameter is None:
            continue
        if int(m.index.max()) >= parameter.shape[m.axis]:
            return None
        index = m.index[gone].reshape(-1)
        if bool(parameter.detach().index_select(m.axis, index.to(parameter.device)).any()):
            return None
        found.append((m.param, m.axis, index))
    return found


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """None for a buffer, and for a name that the model has no longer."""
    try:
        found = tensor_of(model, name)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Parameter) else None


def _own_parameters(model: nn.Module, path: str, uses: Counter[int]) -> dict[str, nn.Parameter]:
    """Parameters of a module that none outside of it shares; {} where there is no such module."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return {}
    inside = list(module.named_parameters(path, remove_duplicate=False))
    here = Counter(id(p) for _, p in inside)
    return {n: p for n, p in inside if here[id(p)] == uses[id(p)]}


def _free(parameter: nn.Parameter) -> Tensor:
    return torch.ones(parameter.shape, dtype=torch.bool)
