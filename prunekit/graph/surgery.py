"""`zero` and `remove` by group name, and `rebuild`, which repeats what `remove` did."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from prunekit.errors import ConfigError
from prunekit.graph.block_lists import drop_blocks
from prunekit.graph.block_verification import BLOCKS
from prunekit.graph.discovery import Discovery, discovery
from prunekit.graph.edit_record import RECORD, Edits, record, record_blocks
from prunekit.graph.groups import Cut
from prunekit.graph.masks import bypass, checked, zero_block, zero_slices
from prunekit.graph.module_sizes import Setting, set_sizes
from prunekit.graph.norms import rescale_norms
from prunekit.graph.slicing import holders, keep_modules, replace, shrink, slice_argument
from prunekit.types import Kept, tensor_of


def zero(model: nn.Module, kept: Kept, known: Discovery | None = None) -> nn.Module:
    """Set the units that `kept` does not keep to zero at every member, in place; a group left out
    keeps all its units.

    A block becomes the identity: by zero parameters, or by a hook where those would not do (blocks
    that normalise after the sum). For channels that a LayerNorm averages over, and for experts,
    removal equals this with statistics over the kept ones. `known` as for `remove`. Raises
    ConfigError for an unknown group, a wrong mask, or a group left empty.
    """
    found = known or discovery(model)
    cuts = checked(found.groups, kept, found.least)
    zero_slices(model, [units for units in cuts if units.group.members])
    for units in cuts:
        for path in units.lost_modules if units.group.kind == "blocks" else ():
            if found.verdicts[BLOCKS].bypass:
                bypass(model.get_submodule(path))
            else:
                zero_block(model, path)
    return model


def remove(
    model: nn.Module,
    kept: Kept,
    norm: Literal["plain", "rescale"] = "plain",
    known: Discovery | None = None,
) -> nn.Module:
    """Cut the units that `kept` does not keep out of the model, in place; a group left out keeps
    all its units.

    Tied tensors stay tied, sizes held in Python and the config follow, meta tensors are sliced as
    well. `norm="rescale"` corrects the RMSNorms that average over removed channels, so that
    removing equals zeroing. `known`: what discovery said before units of other groups went, so
    that a pruner that goes block by block proves nothing twice. Raises ConfigError as `zero` does,
    and where `rescale` meets a norm that has no such correction (LayerNorm).
    """
    if norm not in ("plain", "rescale"):
        raise ConfigError(f"norm={norm!r}; possible: plain, rescale")
    found = known or discovery(model)
    by_name = {c.group.name: c for c in found.candidates}
    changed = [units for units in checked(found.groups, kept, found.least) if units.removed]
    cuts = [Cut(by_name[units.group.name], units) for units in changed if units.group.members]
    recipes = {p: v.recipe for p, v in found.verdicts.items() if v.recipe is not None}
    if norm == "rescale":
        rescale_norms(model, cuts)
    record(model, shrink(model, found.candidates, cuts, recipes))
    for units in changed:
        if units.group.kind == "blocks":
            path = units.group.modules[0].rpartition(".")[0]
            keep = units.mask.nonzero()[:, 0].tolist()
            drop_blocks(model, path, keep)
            record_blocks(model, path, {"of": units.group.units, "keep": keep})
    return model


def rebuild(model: nn.Module, shapes: Mapping[str, Sequence[int]], edits: Edits) -> nn.Module:
    """Give a model built from the architecture's class (from the config before or after pruning)
    the pruned model's structure, in place.

    `shapes`: tensor name -> shape for every parameter and buffer in the checkpoint. Tensors whose
    shape changes become uninitialised. The model has the same `edits` afterwards.
    """
    for lists, drop in ((edits["blocks"], drop_blocks), (edits["lists"], keep_modules)):
        for path, left in lists.items():
            if len(list(model.get_submodule(path).children())) != len(left["keep"]):
                drop(model, path, left["keep"])
    where = holders(model)
    for name, shape in shapes.items():
        old = tensor_of(model, name)
        if tuple(old.shape) != tuple(shape):
            replace(where[id(old)], old, old.detach().new_empty(tuple(shape)))
    for path, values in edits["attributes"].items():
        sizes = {Setting(path, k): _like(model, path, k, v) for k, v in values.items()}
        set_sizes(model, sizes, own=False)
    for path, values in edits["configs"].items():
        set_sizes(model, {Setting(path, k, True): v for k, v in values.items()}, own=path != "")
    for path, arguments in edits["arguments"].items():
        for sliced in arguments:
            slice_argument(model.get_submodule(path), sliced)
    setattr(model, RECORD, copy.deepcopy(edits))
    return model


def _like(model: nn.Module, path: str, attr: str, value: Any) -> Any:
    old = getattr(model.get_submodule(path), attr)
    return tuple(value) if isinstance(old, tuple) else value
