"""A model's repeated blocks: finding them, dropping some, and a small skeleton with one block of
each kind that stands for all.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.graph.labels import tensors

ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    ZeroDivisionError,
)
"""What a model's own code raises when a size that it keeps in Python does not fit."""


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


def block_of(name: str, lists: dict[str, int]) -> tuple[str, int] | None:
    """The list and the index of the block that a parameter or module is in."""
    for path in lists:
        number = name[len(path) + 1 :].split(".")[0]
        if name.startswith(path + ".") and number.isdigit():
            return path, int(number)
    return None


TOKENS = 13
"""Length of the traced sample: a prime, so that few sizes of a model equal it."""
PROMPT = 8
"""How much of it a generated text starts from."""
IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


def configs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every config object that a module holds, once, with the path of the first module that holds
    it.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            yield path, config


def _numbered(blocks: nn.ModuleList) -> list[tuple[str, str, int]]:
    """(submodule, attribute, offset) that hold the block's own number, e.g. `self_attn.layer_idx`.

    A number is told by running along with the blocks wherever an attribute of that name is
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
    """(module path, attribute) of every number that a block or a part of it bears: not a size,
    whatever it equals.
    """
    lists = {path: model.get_submodule(path) for path in block_lists(model)}
    found = {path: _numbered(blocks) for path, blocks in lists.items()}  # type: ignore[arg-type]
    return frozenset(
        (f"{p}.{i}.{sub}".rstrip("."), attr)
        for p in lists
        for i in range(len(lists[p]))
        for sub, attr, _ in found[p]
    )  # type: ignore[arg-type]


def drop_blocks(model: nn.Module, path: str, keep: Sequence[int]) -> None:
    """Keep only these blocks of one list, in place: renumber them and shorten the per-layer lists,
    maps and counts of configs and modules.

    With two blocks or more a number is told from a constant by changing from block to block.
    """
    blocks = model.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(f"{path} is not a ModuleList")
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
    changes = {}
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

    A block that shares parameters with another stands for itself: its units are the other's as
    well.
    """
    blocks = model.get_submodule(path)
    numbered = {(sub, attr) for sub, attr, _ in _numbered(blocks)}
    lists = [
        v
        for _, c in configs(model)
        for v in vars(c).values()
        if isinstance(v, (list, tuple)) and len(v) == len(blocks)
    ]
    owners = Counter(id(p) for block in blocks for p in block.parameters())  # type: ignore[attr-defined]
    first: dict[Any, int] = {}
    out = []
    for i, block in enumerate(blocks):
        parts: list[Any] = [repr(v[i]) for v in lists]
        parts += [i] if any(owners[id(p)] > 1 for p in block.parameters()) else []
        for sub, module in block.named_modules():
            settings = [
                (k, v)
                for k, v in sorted(vars(module).items())
                if isinstance(v, (int, str, bool, type(None)))
            ]
            parts.append(
                (
                    sub,
                    type(module).__qualname__,
                    tuple(
                        (k, v) for k, v in settings if (sub, k) not in numbered and k != "training"
                    ),
                )
            )
        parts += [(n, tuple(p.shape)) for n, p in tensors(block)]
        out.append(first.setdefault(repr(parts), i))
    return out


def clone(model: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy whose tensors are `tensor(old)`; what was tied stays tied."""
    memo = {id(t): _alike(tensor(t), t) for _, t in tensors(model)}
    return copy.deepcopy(model, memo)


def _alike(new: Tensor, old: Tensor) -> Tensor:
    if isinstance(old, nn.Parameter) and not isinstance(new, nn.Parameter):
        return nn.Parameter(new, requires_grad=False)
    return new


def unpaged(t: Tensor) -> Tensor:
    """Zeros of the shape and dtype of `t` on the CPU, from pages that the system hands out on the
    first write only.
    """
    return (
        torch.from_numpy(np.zeros(t.numel() * t.element_size(), dtype=np.uint8))
        .view(t.dtype)
        .reshape(t.shape)
    )


def representatives(kinds: Sequence[int], each: int) -> list[int]:
    """For each block the one that stands for it: the first `each` of a kind stand for themselves,
    later ones for the first.
    """
    seen: dict[int, int] = defaultdict(int)
    out = []
    for i, kind in enumerate(kinds):
        seen[kind] += 1
        out.append(i if seen[kind] <= each else kind)
    return out


def skeleton(model: nn.Module, each: int = 1) -> tuple[nn.Module, dict[str, list[int]]]:
    """A runnable copy on the CPU with `each` blocks of a kind, and for each block list which of its
    blocks stands for each real one.

    Parameters of a CPU model are shared, others are zeros that are never paged in. Buffers of a
    meta model are made anew.
    """
    lists = block_lists(model)
    stands = {p: representatives(block_kinds(model, p), each) for p in lists}
    dropped = {
        id(t)
        for p, kinds in stands.items()
        for i, block in enumerate(model.get_submodule(p))  # type: ignore[arg-type]
        for _, t in tensors(block)
        if i not in set(kinds)
    }
    fresh = {id(t) for _, t in tensors(model) if t.device.type != "cpu"}

    def copied(t: Tensor) -> Tensor:
        if id(t) in dropped:
            return t
        if id(t) in fresh:
            return unpaged(t)
        return t if isinstance(t, nn.Parameter) else t.detach().clone()

    small = clone(model, copied).eval()
    renumbered = {}
    for p, kinds in stands.items():
        keep = sorted(set(kinds))
        if len(keep) < len(kinds):
            drop_blocks(small, p, keep)
        renumbered[p] = [keep.index(k) for k in kinds]
    if any(b.is_meta for b in model.buffers()):
        for module in small.modules():
            if module._buffers and hasattr(small, "_init_weights"):
                small._init_weights(module)
    quiet(small)
    return small, renumbered


def quiet(model: nn.Module) -> None:
    """Plain attention and expert code, no cache: what the tracer reads best. Modules that are not
    transformers' have no such switches.

    A class whose plain attention does not run keeps its own.
    """
    for _, config in configs(model):
        if hasattr(config, "use_cache"):
            config.use_cache = False
    for k in IMPLEMENTATIONS:
        own = [(c, getattr(c, k)) for _, c in configs(model) if getattr(c, k, "eager") != "eager"]
        for config, value in own:
            vars(config).setdefault("_own_implementations", {})[k] = value
            setattr(config, k, "eager")
        try:
            with torch.no_grad():
                _ = model(**inputs_for(model)) if own else None
        except ERRORS:
            for config, value in own:
                del vars(config)["_own_implementations"][k]
                setattr(config, k, value)


def natural(model: nn.Module) -> bool:
    """Undo `quiet`'s choice of attention and expert code; False where there was none to undo."""
    changed = False
    for _, config in configs(model):
        for k, value in vars(config).pop("_own_implementations", {}).items():
            changed = changed or getattr(config, k) != value
            setattr(config, k, value)
    return changed


def open_routing(model: nn.Module, picks: Sequence[tuple[str, int, int]]) -> bool:
    """Let every router pick all its experts, so that a trace meets each of them. `picks`: (module,
    k, of how many) of the top-k ops seen.
    """
    changed = False
    for scope, k, n in picks:
        parts = scope.split(".")
        holders = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts), 0, -1)]
        for holder in [
            *holders,
            *(c for h in holders if hasattr(c := getattr(h, "config", None), "__dict__")),
        ]:
            for attr, value in list(vars(holder).items()):
                if (
                    type(value) is int
                    and value == k < n
                    and any(part in attr for part in ("top", "per_tok"))
                ):
                    setattr(holder, attr, n)
                    changed = True
    return changed


def inputs_for(model: nn.Module, tokens: int = TOKENS) -> dict[str, Tensor]:
    """One short sample of token ids that every vocabulary has."""
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    top = min(max(rows, default=64), 100)
    accepted = list(inspect.signature(model.forward).parameters)
    name = "input_ids" if "input_ids" in accepted or not accepted else accepted[0]
    return {name: torch.arange(tokens)[None] * 7 % max(top - 8, 1) + 8 % top}


def logits_of(output: Any) -> Tensor:
    """The logits, whatever a model wraps them in."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)):
        return next(o for o in output if isinstance(o, Tensor) and o.dim() >= 2)
    raise TypeError(f"the model returned {type(output).__name__}, which holds no logits")
