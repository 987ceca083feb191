"""Cutting units out of a model in place, or setting them to zero; everything that a loader must
repeat is written down as edits.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.graph.groups import Argument, Candidate, Pattern
from prunekit.graph.masks import Keep, Masks, lost_modules, to_keep
from prunekit.graph.skeleton import configs
from prunekit.types import tensor_of

Cut = tuple[Candidate, int]
"""A candidate and how many of its units go."""
Sizes = dict[tuple[str, str], Any]
"""(module path, attribute) -> value; `config.x` is an attribute of the module's config."""
STANDARD = {
    "hidden": ("hidden_size",),
    "neurons": ("intermediate_size",),
    "heads": ("num_attention_heads", "num_key_value_heads"),
}
"""Names that transformers gives to sizes in every config, through its `attribute_map`."""


@dataclass(frozen=True)
class Recipe:
    """What has to follow when units of a pattern go: (module class, attribute) pairs, and whether
    the shared config may follow too.
    """

    attributes: frozenset[tuple[str, str]] = frozenset()
    config: bool = True


# ---- cut


def holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str, dict[str, Any]]]]:
    """id of a tensor -> every (module, attribute, dict) that holds it: tied tensors
    have several.
    """
    out: dict[int, list[tuple[nn.Module, str, dict[str, Any]]]] = defaultdict(list)
    for module in model.modules():
        for store in (module._parameters, module._buffers, vars(module)):
            for leaf, value in store.items():
                if isinstance(value, Tensor):
                    out[id(value)].append((module, leaf, store))
    return out


def cut(model: nn.Module, keep: Keep) -> None:
    """Slice the tensors, on whatever device they are (meta included), and set the sizes that
    torch's own modules carry.
    """
    where = holders(model)
    for name, axes in keep.items():
        old = tensor_of(model, name)
        new = old.detach()
        for axis, index in axes.items():
            new = new.index_select(axis, index.to(new.device))
        replace(where[id(old)], old, new.contiguous())


def replace(
    places: Iterable[tuple[nn.Module, str, dict[str, Any]]], old: Tensor, new: Tensor
) -> None:
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module, leaf, store in places:
        store[leaf] = new
        fit(module, leaf, old.shape)


def fit(module: nn.Module, leaf: str, old: Sequence[int]) -> None:
    """Make the integer sizes of a torch module (or transformers' Conv1D) say what its tensor
    `leaf`, which had shape `old`, is now.
    """
    weight = vars(module).get(leaf, module._parameters.get(leaf))
    if leaf != "weight" or weight is None:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.Conv1d):
        module.out_channels = weight.shape[0]
        module.groups = (
            module.groups if module.groups == 1 else module.groups * weight.shape[0] // old[0]
        )
        module.in_channels = weight.shape[1] * module.groups
    elif type(module).__name__ == "Conv1D":
        module.nx, module.nf = weight.shape
    elif tuple(getattr(module, "normalized_shape", ())) == tuple(old):
        module.normalized_shape = tuple(weight.shape)


# ---- sizes kept in Python


def sized(value: Any) -> bool:
    """An int, or a few of them: what can be a size."""
    if isinstance(value, (tuple, list)):
        return 0 < len(value) < 8 and all(type(v) is int for v in value)
    return type(value) is int


def follow(
    candidate: Candidate, removed: int, model: nn.Module
) -> dict[tuple[str, str], tuple[str, Any, Any, bool]]:
    """(module path, attribute) -> (its class, old, new, ambiguous) of every size in a scope that
    shrinks with the group.
    """
    out: dict[tuple[str, str], tuple[str, Any, Any, bool]] = {}
    modules = dict(model.named_modules())
    units = candidate.group.units
    for path, extents in candidate.extents.items():
        module = modules.get(path)
        block = candidate.block
        if (
            module is None
            or block is not None
            and path != block
            and not path.startswith(block + ".")
        ):
            continue
        own = {k: v for k, v in vars(module).items() if not k.startswith("_") and sized(v)}
        if type(module).__module__.startswith("torch.nn"):
            own = {
                k: v
                for k, v in own.items()
                if k == "normalized_shape" and module._parameters.get("weight") is None
            }
        elif type(module).__name__ == "Conv1D":
            own = {}
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "__dict__"):
            own |= {
                f"config.{k}": v
                for k, v in vars(config).items()
                if not k.startswith("_") and not k.endswith("token_id") and sized(v)
            }
        for attr, old in own.items():
            if (path, attr) in candidate.numbers:
                continue
            values = list(old) if isinstance(old, (tuple, list)) else [old]
            if not any(v in extents for v in values):
                continue
            new = [v - removed * _step(extents[v], v, units) if v in extents else v for v in values]
            doubtful = any(v in extents and (len(extents[v]) > 1) for v in values)
            out[path, attr] = (
                type(module).__name__,
                old,
                type(old)(new) if isinstance(old, (tuple, list)) else new[0],
                doubtful,
            )
    return out


def _step(by: dict[int, int], extent: int, units: int) -> int:
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
    for (path, attr), value in changes.items():
        module = model.get_submodule(path)
        if attr.startswith("config."):
            if own and path not in copied:
                module.config = copy.copy(module.config)
                copied.add(path)
            setattr(module.config, attr[7:], value)
        else:
            setattr(module, attr, value)


def patches(model: nn.Module, cuts: Sequence[Cut], recipes: dict[Pattern, Recipe]) -> Sizes:
    """(module path, attribute) -> new value, for what the recipes say must follow."""
    out: Sizes = {}
    for candidate, removed in cuts:
        recipe = recipes.get(candidate.pattern, Recipe())
        for key, (cls, old, new, _) in follow(candidate, removed, model).items():
            if (cls, key[1]) in recipe.attributes:
                base = out.get(key, old)
                out[key] = (
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
    recipes: dict[Pattern, Recipe],
) -> Sizes:
    """Sizes under transformers' standard names, where every layer ends up with the same one;
    head_dim is made explicit.
    """
    removed = {c.group.name: n for c, n in cuts}
    free = {c.group.kind for c, _ in cuts if recipes.get(c.pattern, Recipe()).config}
    out: Sizes = {}
    for path, config in configs(model):
        for kind in free & set(STANDARD):
            groups = [c.group for c in everything if c.group.kind == kind]
            if kind in ("heads", "hidden"):
                heads, hidden = (
                    standard(config, "num_attention_heads"),
                    standard(config, "hidden_size"),
                )
                fixed = isinstance(getattr(type(config), "head_dim", None), property)
                if (
                    heads
                    and hidden
                    and hidden % heads == 0
                    and standard(config, "head_dim") is None
                    and not fixed
                ):
                    out[path, "config.head_dim"] = hidden // heads
            for name in STANDARD[kind]:
                old = standard(config, name)
                same = [
                    g
                    for g in groups
                    if old and old % g.units == 0 and (kind == "heads" or old == g.units)
                ]
                new = {old // g.units * (g.units - removed.get(g.name, 0)) for g in same}
                if len(new) == 1 and (kind != "heads" or len(same) == len(groups)) and new != {old}:
                    out[path, f"config.{name}"] = new.pop()
    return out


def plain_experts(model: nn.Module, asked: Sequence[tuple[Candidate, Masks]]) -> Sizes:
    """Where stacked expert weights no longer start at multiples of 16 bytes, transformers' grouped
    kernels refuse them: use its plain loop.
    """
    stacked = {
        m.param for c, _ in asked for m in c.group.members if tensor_of(model, m.param).dim() == 3
    }
    rows = [tensor_of(model, n) for n in stacked]
    if all(t.shape[d] * t.element_size() % 16 == 0 for t in rows for d in (1, 2)):
        return {}
    return {
        (p, "config._experts_implementation"): "eager"
        for p, c in configs(model)
        if hasattr(c, "_experts_implementation")
    }


def keep_modules(model: nn.Module, path: str, keep: Sequence[int]) -> None:
    parent, _, leaf = path.rpartition(".")
    old = model.get_submodule(path)
    setattr(model.get_submodule(parent), leaf, nn.ModuleList([old[i] for i in keep]))  # type: ignore[index]


def slice_argument(argument: Argument, keep: Tensor) -> Callable[..., Any]:
    """A forward pre-hook that slices one argument; batches that were flattened into the dim repeat
    the pattern.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        t = args[argument.key] if isinstance(argument.key, int) else kwargs[argument.key]
        repeats = t.shape[argument.dim] // argument.size
        index = torch.cat([keep + r * argument.size for r in range(repeats)]).to(t.device)
        t = t.index_select(argument.dim, index)
        if isinstance(argument.key, int):
            return (*args[: argument.key], t, *args[argument.key + 1 :]), kwargs
        return args, {**kwargs, argument.key: t}

    return hook


def shrink(
    model: nn.Module,
    everything: Sequence[Candidate],
    asked: Sequence[tuple[Candidate, Masks]],
    recipes: dict[Pattern, Recipe],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Cut the units out of the model and let sizes, configs and arguments follow. Returns the edits
    (see `remove`).
    """
    cuts = [(c, int((~next(iter(masks.values()))).sum())) for c, masks in asked]
    sizes = patches(model, cuts, recipes)
    follow_up = config_sizes(model, everything, cuts, recipes)
    cut(model, to_keep(model, [(c.group, masks) for c, masks in asked]))
    edits: dict[str, dict[str, dict[str, Any]]] = {
        "attributes": {},
        "configs": {},
        "arguments": {},
        "lists": {},
    }
    for c, masks in asked:
        if c.group.modules:
            path = c.group.modules[0].rpartition(".")[0]
            lost = lost_modules(c.group, masks)
            edits["lists"][path] = {
                "of": c.group.units,
                "keep": [i for i in range(c.group.units) if i not in lost],
            }
            keep_modules(model, path, edits["lists"][path]["keep"])
    follow_up |= plain_experts(model, asked)
    set_sizes(model, sizes, own=True)
    set_sizes(model, follow_up, own=False)
    for (path, attr), value in {**sizes, **follow_up}.items():
        kind, _, leaf = attr.rpartition(".")
        edits["configs" if kind else "attributes"].setdefault(path, {})[leaf] = value
    for c, masks in asked:
        mask = next(iter(masks.values()))
        for a in c.arguments:
            stays = torch.ones(a.size, dtype=torch.bool)
            stays[torch.from_numpy(a.index)[~mask].reshape(-1)] = False
            keep = stays.nonzero()[:, 0]
            model.get_submodule(a.module).register_forward_pre_hook(
                slice_argument(a, keep), with_kwargs=True
            )
            edits["arguments"].setdefault(a.module, {})[str(a.key)] = {
                "dim": a.dim,
                "size": a.size,
                "keep": keep.tolist(),
            }
    return edits
