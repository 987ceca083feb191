"""The decoder blocks of a model, and the linear modules inside them: the one definition of both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from itertools import takewhile

from torch import nn

from prunekit.architecture.linear import is_linear
from prunekit.errors import ConfigError


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the decoder blocks, in order: the items of the `nn.ModuleList` that holds most of
    the model's parameters, the outermost of equals.

    Raises ConfigError for a model without such a list.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} has no nn.ModuleList: its blocks cannot be told apart"
        )
    # Outer modules are named before inner ones, and max takes the first of equals.
    path, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return tuple(f"{path}.{i}" if path else str(i) for i in range(len(blocks)))


def innermost_around(names: Iterable[str]) -> str:
    """The innermost module that holds all the named ones, or is one of them."""
    levels = zip(*(name.split(".") for name in names))
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels))


def check_unbroken(blocks: Sequence[str], doing: str) -> None:
    """Raises ConfigError where the named blocks are no unbroken run; `doing` begins the message."""
    parent, dot, first = blocks[0].rpartition(".")
    run = [f"{parent}{dot}{i}" for i in range(int(first), int(first) + len(blocks))]
    if list(blocks) != run:
        raise ConfigError(f"{doing} one unbroken run of blocks, and {', '.join(blocks)} is none")


def block_modules(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, in order. Raises ConfigError as `block_names` does."""
    return [model.get_submodule(name) for name in block_names(model)]


def linear_names(model: nn.Module, targets: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the linear modules inside the decoder blocks, block by block; empty ones are left
    out.

    targets: names or glob patterns (`q_proj`, `mlp.*`, `*_proj`), compared with a module's name
        inside its block and with the last part of it; None takes all.

    Raises ConfigError for a target that matches none, naming those there are.
    """
    found = list(_linears(model))
    lacking = [t for t in targets or () if not any(is_target(name, [t]) for _, name in found)]
    chosen = tuple(name for name, inside in found if is_target(inside, targets))
    if lacking or not chosen:
        names = ", ".join(sorted({inside for _, inside in found})) or "none"
        raise ConfigError(
            f"targets={lacking or targets} match no linear module of the blocks; there are: {names}"
        )
    return chosen


def is_target(name: str, targets: Sequence[str] | None) -> bool:
    """Whether a module's name in its block, or the last part of it, matches one of the targets."""
    parts = (name, name.rpartition(".")[2])
    return targets is None or any(fnmatch(part, t) for t in targets for part in parts)


def _linears(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Name in the model and name in its block of every linear module that has weights."""
    for block in block_names(model):
        for name, module in model.get_submodule(block).named_modules():
            if is_linear(module) and module.weight.numel():
                yield f"{block}.{name}" if name else block, name
