"""A model's repeated blocks: finding them, telling which are built alike, dropping some."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn

from prunekit.graph.labels import tensors
from prunekit.graph.model_settings import configs


def block_lists(model: nn.Module) -> dict[str, int]:
    """path of every outermost ModuleList that owns parameters -> its length.

    Not only that of `architecture.blocks`: whatever repeats has to shrink for the skeleton, an
    encoder beside a decoder too, and which of the lists run is not known before the trace.
    """
    out: dict[str, int] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(p + ".") for p in out)
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and not inside
            and any(True for _ in module.parameters())
        ):
            out[path] = len(module)
    return out


def modules_in(model: nn.Module, path: str) -> nn.ModuleList:
    """The ModuleList called `path`. Raises TypeError for another module."""
    found = model.get_submodule(path)
    if not isinstance(found, nn.ModuleList):
        raise TypeError(f"{path} is not a ModuleList")
    return found


def block_of(name: str, lists: dict[str, int]) -> tuple[str, int] | None:
    """The list and the index of the block that a parameter or module is in."""
    for path in lists:
        number = name[len(path) + 1 :].split(".")[0]
        if name.startswith(path + ".") and number.isdigit():
            return path, int(number)
    return None


def _numbered(blocks: nn.ModuleList) -> list[tuple[str, str, int]]:
    """(submodule, attribute, offset) that hold the block's own number, e.g. `self_attn.layer_idx`.

    An attribute is such a number if it counts along with the blocks wherever one of that name is
    (hybrids: under other submodules in other blocks), else wherever it is under that submodule;
    seen in two blocks at least.
    """
    named: dict[str, set[tuple[int, int]]] = defaultdict(set)
    placed: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)
    for i, block in enumerate(blocks):
        for path, module in block.named_modules():
            for attr, value in vars(module).items():
                if isinstance(value, int) and not isinstance(value, bool):
                    named[attr].add((i, value - i))
                    placed[path, attr].add((i, value - i))

    def along(seen: set[tuple[int, int]]) -> bool:
        return len({i for i, _ in seen}) > 1 and len({offset for _, offset in seen}) == 1

    return [
        (*key, next(iter(seen))[1])
        for key, seen in placed.items()
        if along(named[key[1]]) or along(seen)
    ]


def numbers(model: nn.Module) -> frozenset[tuple[str, str]]:
    """(module path, attribute) of every block number that a block or a part of it keeps: not a
    size, whatever it equals.
    """
    return frozenset(
        (f"{path}.{i}.{sub}".rstrip("."), attr)
        for path, n in block_lists(model).items()
        for sub, attr, _ in _numbered(modules_in(model, path))
        for i in range(n)
    )


def drop_blocks(model: nn.Module, path: str, keep: Sequence[int]) -> None:
    """Keep only these blocks of one list, in place: renumber them and shorten the per-layer lists,
    maps and counts of configs and modules.

    A block number differs from a constant by changing from block to block.
    """
    blocks = modules_in(model, path)
    old = len(blocks)
    held = _numbered(blocks)
    kept = nn.ModuleList([blocks[i] for i in keep])
    for new, block in enumerate(kept):
        parts = dict(block.named_modules())
        for sub, attr, offset in held:
            if sub in parts and attr in vars(parts[sub]):
                setattr(parts[sub], attr, new + offset)
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, leaf, kept)
    for holder in [
        *(c for _, c in configs(model)),
        *(m for n, m in model.named_modules() if not n.startswith(path + ".")),
    ]:
        _shorten(holder, old, keep)
    for module in model.modules():
        for attr, value in list(vars(module).items()):
            if (
                isinstance(value, dict)
                and "layer" in attr
                and value
                and all(type(k) is int and 0 <= k < old for k in value)
            ):
                setattr(module, attr, {keep.index(k): v for k, v in value.items() if k in keep})


def _shorten(holder: Any, old: int, keep: Sequence[int]) -> None:
    """Per-layer lists, lists of layer numbers and counts that a config or module holds."""
    changes: dict[str, Any] = {}
    for attr, value in vars(holder).items():
        per_layer = old > 8 or any(part in attr for part in ("layer", "block", "pattern", "type"))
        if (
            isinstance(value, (list, tuple))
            and len(value) == old
            and per_layer
            and not hasattr(value, "_fields")
        ):
            changes[attr] = type(value)(value[i] for i in keep)
        elif isinstance(value, list) and _numbers(attr, value, old):
            changes[attr] = [list(keep).index(i) for i in value if i in keep]
        elif (
            isinstance(value, int)
            and value == old
            and "layer" in attr
            and not isinstance(value, bool)
        ):
            changes[attr] = len(keep)
    for attr, value in changes.items():
        setattr(holder, attr, value)
    mapped = getattr(holder, "attribute_map", {}).get("num_hidden_layers")
    if mapped and getattr(holder, mapped, None) == old:
        setattr(holder, mapped, len(keep))


def _numbers(attr: str, value: list[Any], old: int) -> bool:
    """Whether a list names some of the blocks, such as `attn_layer_indices`."""
    named = any(part in attr for part in ("layer", "idx", "indices"))
    return (
        named
        and 0 < len(value) < old
        and all(type(i) is int and 0 <= i < old for i in value)
        and len(set(value)) == len(value)
    )


def block_kinds(model: nn.Module, path: str) -> list[int]:
    """For each block of a list the index of the first block that is built like it: classes, shapes,
    settings, per-layer config entries.

    A block that shares parameters with another is a kind of its own: its units are the other's as
    well.
    """
    blocks = modules_in(model, path)
    numbered = {(sub, attr) for sub, attr, _ in _numbered(blocks)}
    lists = [
        v
        for _, c in configs(model)
        for v in vars(c).values()
        if isinstance(v, (list, tuple)) and len(v) == len(blocks)
    ]
    owners = Counter(id(p) for block in blocks for p in block.parameters())
    first: dict[Any, int] = {}
    out = []
    for i, block in enumerate(blocks):
        parts: list[Any] = [repr(v[i]) for v in lists]
        parts += [i] if any(owners[id(p)] > 1 for p in block.parameters()) else []
        for sub, module in block.named_modules():
            settings = [
                (k, v)
                for k, v in sorted(vars(module).items())
                if isinstance(v, (int, str, type(None)))
                and (sub, k) not in numbered
                and k != "training"
            ]
            parts.append((sub, type(module).__qualname__, settings))
        parts += [(n, tuple(p.shape)) for n, p in tensors(block)]
        out.append(first.setdefault(repr(parts), i))
    return out
