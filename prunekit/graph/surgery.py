"""`zero` and `remove` by group name, and the edits that a loader repeats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.graph.discovery import Discovery, discovery
from prunekit.graph.groups import Argument
from prunekit.graph.masks import Masks, bypass, checked, zero_block, zero_slices
from prunekit.graph.norms import rescale_norms
from prunekit.graph.skeleton import drop_blocks
from prunekit.graph.slicing import holders, keep_modules, replace, set_sizes, shrink, slice_argument
from prunekit.graph.verification import BLOCKS
from prunekit.types import Group, Kept, tensor_of

Edits = dict[str, dict[str, Any]]
KINDS = ("attributes", "configs", "arguments", "lists", "blocks")
_EDITS: WeakKeyDictionary[nn.Module, Edits] = WeakKeyDictionary()


def zero(model: nn.Module, kept: Kept) -> nn.Module:
    """Set the units that `kept` does not keep to zero at every member, in place; a group left out
    keeps all its units.

    A block becomes the identity: by zero parameters, or by a hook where those would not do (blocks
    that normalise after the sum). For channels that a LayerNorm averages over, and for experts,
    removal equals this with statistics over the kept ones. Raises ConfigError for an unknown group,
    a wrong mask, or a group left empty.
    """
    found = discovery(model)
    asked = checked(found.groups, kept, found.least)
    zero_slices(model, [(g, masks) for g, masks in asked if g.members])
    for group, masks in asked:
        if group.kind == "blocks":
            for i in (~masks["", -1]).nonzero()[:, 0].tolist():
                if found.verdicts[BLOCKS].bypass:
                    bypass(model.get_submodule(group.modules[i]))
                else:
                    zero_block(model, group.modules[i])
    return model


def remove(model: nn.Module, kept: Kept, norm: Literal["plain", "rescale"] = "plain") -> nn.Module:
    """Cut the units that `kept` does not keep out of the model, in place; a group left out keeps
    all its units.

    Tied tensors stay tied, sizes held in Python and the config follow, meta tensors are sliced as
    well. `norm="rescale"` corrects the RMSNorms that average over removed channels, so that
    removing equals zeroing. Raises ConfigError as `zero` does, and where `rescale` meets a norm
    that has no such correction (LayerNorm).
    """
    if norm not in ("plain", "rescale"):
        raise ConfigError(f"norm={norm!r}; possible: plain, rescale")
    found = discovery(model)
    by_name = {c.group.name: c for c in found.candidates}
    asked = [
        (g, masks)
        for g, masks in checked(found.groups, kept, found.least)
        if not all(bool(m.all()) for m in masks.values())
    ]
    cuts = [(by_name[g.name], masks) for g, masks in asked if g.members]
    recipes = {p: v.recipe for p, v in found.verdicts.items() if v.recipe is not None}
    if norm == "rescale":
        rescale_norms(model, cuts)
    edits = shrink(model, found.candidates, cuts, recipes)
    _record(model, edits)
    for group, masks in asked:
        if group.kind == "blocks":
            _drop(model, group, masks["", -1].nonzero()[:, 0].tolist())
    return model


def _record(model: nn.Module, edits: Edits) -> None:
    total = _EDITS.setdefault(model, {k: {} for k in KINDS})
    for kind in ("attributes", "configs"):
        for path, values in edits[kind].items():
            total[kind].setdefault(path, {}).update(values)
    for path, now in edits["lists"].items():
        before = total["lists"].get(path, {"of": now["of"], "keep": list(range(now["of"]))})
        total["lists"][path] = {
            "of": before["of"],
            "keep": [before["keep"][i] for i in now["keep"]],
        }
    for path, hooks in edits["arguments"].items():
        total["arguments"].setdefault(path, []).extend(
            {"argument": k, **v} for k, v in hooks.items()
        )


def _drop(model: nn.Module, group: Group, keep: Sequence[int]) -> None:
    path = group.modules[0].rpartition(".")[0]
    drop_blocks(model, path, keep)
    total = _EDITS[model]
    before = total["blocks"].get(path, {"of": group.units, "keep": list(range(group.units))})
    total["blocks"][path] = {"of": before["of"], "keep": [before["keep"][i] for i in keep]}
    renumbered = {i: n for n, i in enumerate(keep)}
    for kind in KINDS[:4]:
        total[kind] = {
            new: v
            for p, v in total[kind].items()
            if (new := _renamed(p, path, renumbered)) is not None
        }


def _renamed(name: str, path: str, renumbered: dict[int, int]) -> str | None:
    match = re.match(re.escape(path) + r"\.(\d+)(.*)", name)
    if match is None:
        return name
    number = renumbered.get(int(match[1]))
    return None if number is None else f"{path}.{number}{match[2]}"


def edits(model: nn.Module) -> Edits:
    """What all `remove`s did to the model beyond the tensors' shapes, as JSON-able data for
    `rebuild`.

    `attributes` and `configs`: module -> {attribute: value} (of the module, of its own config);
    `arguments`: module -> constants that enter it sliced; `lists`, `blocks`: ModuleList -> {of,
    keep}, original numbers. Module names are those after dropping blocks.
    """
    return _EDITS.get(model, {k: {} for k in KINDS})


def rebuild(model: nn.Module, shapes: dict[str, Sequence[int]], edits: Edits) -> nn.Module:
    """Give a model built from the architecture's class (from the config before or after pruning)
    the pruned model's structure, in place.

    `shapes`: tensor name -> shape for every parameter and buffer in the checkpoint. Tensors whose
    shape changes become uninitialised.
    """
    for path, dropped in edits["blocks"].items():
        if len(model.get_submodule(path)) != len(dropped["keep"]):  # type: ignore[arg-type]
            drop_blocks(model, path, dropped["keep"])
    for path, dropped in edits["lists"].items():
        if len(model.get_submodule(path)) != len(dropped["keep"]):  # type: ignore[arg-type]
            keep_modules(model, path, dropped["keep"])
    where = holders(model)
    for name, shape in shapes.items():
        old = tensor_of(model, name)
        if tuple(old.shape) != tuple(shape):
            replace(where[id(old)], old, old.detach().new_empty(tuple(shape)))
    for path, values in edits["attributes"].items():
        set_sizes(
            model, {(path, k): _like(model, path, k, v) for k, v in values.items()}, own=False
        )
    for path, values in edits["configs"].items():
        set_sizes(model, {(path, f"config.{k}"): v for k, v in values.items()}, own=path != "")
    for path, hooks in edits["arguments"].items():
        for h in hooks:
            key = int(h["argument"]) if h["argument"].isdigit() else h["argument"]
            argument = Argument(path, key, h["dim"], h["size"], torch.empty(0).numpy())
            model.get_submodule(path).register_forward_pre_hook(
                slice_argument(argument, torch.tensor(h["keep"])), with_kwargs=True
            )
    return model


def _like(model: nn.Module, path: str, attr: str, value: Any) -> Any:
    old = getattr(model.get_submodule(path), attr)
    return tuple(value) if isinstance(old, tuple) else value


__all__ = ["Discovery", "Masks", "Tensor", "edits", "rebuild", "remove", "zero"]
