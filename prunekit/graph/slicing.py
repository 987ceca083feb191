"""Cutting units out of a model in place; everything that a loader must repeat is written down as
edits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.architecture.mapped import beside
from prunekit.graph.block_lists import modules_in
from prunekit.graph.edit_record import Edits, SlicedArgument, no_edits
from prunekit.graph.groups import Candidate, Cut, Pattern
from prunekit.graph.masks import Keep, to_keep
from prunekit.graph.module_sizes import (
    Recipe,
    config_sizes,
    plain_experts,
    required_sizes,
    set_sizes,
)
from prunekit.types import tensor_of


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


def slice_tensors(model: nn.Module, keep: Keep) -> None:
    """Slice the tensors, on whatever device they are (meta included), and set the sizes that
    torch's own modules carry.
    """
    where = holders(model)
    for name, axes in keep.items():
        old = tensor_of(model, name)
        new = old.detach()
        for axis, index in axes.items():
            new = new.index_select(axis, index.to(new.device))
        replace(where[id(old)], old, beside(new.contiguous(), old))


def replace(
    places: Iterable[tuple[nn.Module, str, dict[str, Any]]], old: Tensor, new: Tensor
) -> None:
    """Put `new` wherever `old` is held."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module, leaf, store in places:
        store[leaf] = new
        update_sizes(module, leaf, old.shape)


def update_sizes(module: nn.Module, leaf: str, old: Sequence[int]) -> None:
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
        norm: Any = module
        norm.normalized_shape = tuple(weight.shape)


def keep_modules(model: nn.Module, path: str, keep: Sequence[int]) -> None:
    parent, _, leaf = path.rpartition(".")
    old = modules_in(model, path)
    setattr(model.get_submodule(parent), leaf, nn.ModuleList([old[i] for i in keep]))


def slice_argument(module: nn.Module, sliced: SlicedArgument) -> None:
    """From now on one argument enters the module sliced; batches that were flattened into the dim
    repeat the pattern.
    """
    key, dim, size = sliced["argument"], sliced["dim"], sliced["size"]
    keep = torch.tensor(sliced["keep"])

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        t = args[key] if isinstance(key, int) else kwargs[key]
        index = torch.cat([keep + r * size for r in range(t.shape[dim] // size)]).to(t.device)
        t = t.index_select(dim, index)
        if isinstance(key, int):
            return (*args[:key], t, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: t}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def shrink(
    model: nn.Module,
    everything: Sequence[Candidate],
    cuts: Sequence[Cut],
    recipes: Mapping[Pattern, Recipe],
) -> Edits:
    """Cut the units out of the model and let sizes, configs and arguments follow. Returns what a
    loader has to repeat.
    """
    sizes = required_sizes(model, cuts, recipes)
    shared = config_sizes(model, everything, cuts, recipes)
    slice_tensors(model, to_keep(model, [c.units for c in cuts]))
    edits = no_edits()
    for c in cuts:
        group, lost = c.candidate.group, c.units.lost_modules
        if group.modules:
            path = group.modules[0].rpartition(".")[0]
            keep = [i for i, name in enumerate(group.modules) if name not in lost]
            edits["lists"][path] = {"of": group.units, "keep": keep}
            keep_modules(model, path, keep)
    shared |= plain_experts(model, cuts)
    set_sizes(model, sizes, own=True)
    set_sizes(model, shared, own=False)
    for setting, value in {**sizes, **shared}.items():
        where = edits["configs" if setting.in_config else "attributes"]
        where.setdefault(setting.owner, {})[setting.name] = value
    for c in cuts:
        for a in c.candidate.arguments:
            gone = set(a.index[~c.units.mask.numpy()].reshape(-1).tolist())
            kept = [i for i in range(a.size) if i not in gone]
            sliced: SlicedArgument = {"argument": a.key, "dim": a.dim, "size": a.size, "keep": kept}
            slice_argument(model.get_submodule(a.module), sliced)
            edits["arguments"].setdefault(a.module, []).append(sliced)
    return edits
