"""Sizes that modules and configs keep in Python: which of them shrink when units go, to what."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from prunekit.graph.groups import Candidate, Cut, Pattern
from prunekit.graph.model_settings import configs
from prunekit.types import tensor_of

STANDARD = {
    "hidden": ("hidden_size",),
    "neurons": ("intermediate_size",),
    "heads": ("num_attention_heads", "num_key_value_heads"),
}
"""Names that transformers gives to sizes in every config, through its `attribute_map`."""


class Setting(NamedTuple):
    """An attribute of a module or of its config. `owner`: the module's path, or its class where all
    modules of a class are meant.
    """

    owner: str
    name: str
    in_config: bool = False


Sizes = dict[Setting, Any]
"""Attributes of single modules -> their values."""


class Change(NamedTuple):
    """What a size becomes. `doubtful`: its extent shrank in some places and stayed in others."""

    cls: str
    old: Any
    new: Any
    doubtful: bool


@dataclass(frozen=True)
class Recipe:
    """What has to follow when units of a pattern go: attributes of module classes, and whether the
    shared config may follow too.
    """

    attributes: frozenset[Setting] = frozenset()
    config: bool = True


def sized(value: Any) -> bool:
    """An int, or a few of them: what can be a size."""
    if isinstance(value, (tuple, list)):
        return 0 < len(value) < 8 and all(type(v) is int for v in value)
    return type(value) is int


def dependent_sizes(candidate: Candidate, removed: int, model: nn.Module) -> dict[Setting, Change]:
    """Every size in the candidate's modules that equals an extent which shrinks with its units."""
    out: dict[Setting, Change] = {}
    modules, block = dict(model.named_modules()), candidate.block
    for path, extents in candidate.extents.items():
        module = modules.get(path)
        outside = block is not None and path != block and not path.startswith(block + ".")
        if module is None or outside:
            continue
        for setting, old in _own_sizes(path, module).items():
            values = list(old) if isinstance(old, (tuple, list)) else [old]
            number = not setting.in_config and (path, setting.name) in candidate.numbers
            if number or not any(v in extents for v in values):
                continue
            new = [_shrunk(v, removed, extents, candidate.group.units) for v in values]
            doubtful = any(v in extents and len(extents[v]) > 1 for v in values)
            whole = type(old)(new) if isinstance(old, (tuple, list)) else new[0]
            out[setting] = Change(type(module).__name__, old, whole, doubtful)
    return out


def _own_sizes(path: str, module: nn.Module) -> Sizes:
    """Sizes that a module and its config hold; torch's own modules and Conv1D follow their
    tensors.
    """
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and sized(v)}
    if type(module).__module__.startswith("torch.nn"):
        without_weight = module._parameters.get("weight") is None
        own = {k: v for k, v in own.items() if k == "normalized_shape" and without_weight}
    elif type(module).__name__ == "Conv1D":
        own = {}
    out: Sizes = {Setting(path, k): v for k, v in own.items()}
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "__dict__"):
        for k, v in vars(config).items():
            if not k.startswith("_") and not k.endswith("token_id") and sized(v):
                out[Setting(path, k, True)] = v
    return out


def _shrunk(value: int, removed: int, extents: Mapping[int, Counter[int]], units: int) -> int:
    return value - removed * _step(extents[value], value, units) if value in extents else value


def _step(by: Counter[int], extent: int, units: int) -> int:
    """How much an extent shrinks per unit: in proportion where that was seen, else as was seen
    most.
    """
    if extent % units == 0 and extent // units in by:
        return extent // units
    return max((d for d in by if d), key=lambda d: by[d])


def set_sizes(model: nn.Module, changes: Sizes, own: bool) -> None:
    """Set attributes; with `own` a module whose config changes gets a copy of it first, so that
    other layers keep theirs.
    """
    copied: set[str] = set()
    for setting, value in changes.items():
        holder: Any = model.get_submodule(setting.owner)
        if setting.in_config:
            if own and setting.owner not in copied:
                holder.config = copy.copy(holder.config)
                copied.add(setting.owner)
            holder = holder.config
        setattr(holder, setting.name, value)


def required_sizes(
    model: nn.Module, cuts: Sequence[Cut], recipes: Mapping[Pattern, Recipe]
) -> Sizes:
    """New values of what the recipes say must follow."""
    out: Sizes = {}
    for cut in cuts:
        recipe = recipes.get(cut.candidate.pattern, Recipe())
        changes = dependent_sizes(cut.candidate, cut.units.removed, model)
        for setting, (cls, old, new, _) in changes.items():
            if setting._replace(owner=cls) in recipe.attributes:
                base = out.get(setting, old)
                out[setting] = (
                    base + (new - old)
                    if isinstance(old, int)
                    else type(old)(b + n - o for b, n, o in zip(base, new, old, strict=True))
                )
    return out


def standard(config: Any, name: str) -> int | None:
    """A size under transformers' standard name, read past the guards of configs whose layers
    differ.
    """
    value = vars(config).get(getattr(config, "attribute_map", {}).get(name, name))
    return value if type(value) is int else None


def config_sizes(
    model: nn.Module,
    everything: Sequence[Candidate],
    cuts: Sequence[Cut],
    recipes: Mapping[Pattern, Recipe],
) -> Sizes:
    """Sizes under transformers' standard names, where every layer ends up with the same one;
    head_dim is made explicit.
    """
    removed = {c.candidate.group.name: c.units.removed for c in cuts}
    free = {
        c.candidate.group.kind for c in cuts if recipes.get(c.candidate.pattern, Recipe()).config
    }
    out: Sizes = {}
    for path, config in configs(model):
        for kind in free & set(STANDARD):
            groups = [c.group for c in everything if c.group.kind == kind]
            if kind in ("heads", "hidden") and (head_dim := _implied_head_dim(config)):
                out[Setting(path, "head_dim", True)] = head_dim
            for name in STANDARD[kind]:
                old = standard(config, name)
                same = [
                    g
                    for g in groups
                    if old and old % g.units == 0 and (kind == "heads" or old == g.units)
                ]
                new = {old // g.units * (g.units - removed.get(g.name, 0)) for g in same if old}
                if len(new) == 1 and (kind != "heads" or len(same) == len(groups)) and new != {old}:
                    out[Setting(path, name, True)] = new.pop()
    return out


def _implied_head_dim(config: Any) -> int | None:
    """hidden_size / heads, where the config says so by no head_dim of its own."""
    heads, hidden = standard(config, "num_attention_heads"), standard(config, "hidden_size")
    fixed = isinstance(getattr(type(config), "head_dim", None), property)
    if not heads or not hidden or hidden % heads or fixed:
        return None
    return None if standard(config, "head_dim") is not None else hidden // heads


def plain_experts(model: nn.Module, cuts: Sequence[Cut]) -> Sizes:
    """Where stacked expert weights no longer start at multiples of 16 bytes, transformers' grouped
    kernels refuse them: use its plain loop.
    """
    names = {m.param for c in cuts for m in c.candidate.group.members}
    stacked = [t for n in names if (t := tensor_of(model, n)).dim() == 3]
    if all(t.shape[d] * t.element_size() % 16 == 0 for t in stacked for d in (1, 2)):
        return {}
    return {
        Setting(p, "_experts_implementation", True): "eager"
        for p, c in configs(model)
        if hasattr(c, "_experts_implementation")
    }
