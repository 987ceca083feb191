"""Matrices that several modules use, in one block or in several (Zamba's attention): what each of
them reads counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from prunekit.activations.blockwise import BlockRun
from prunekit.activations.runs import ModelRun
from prunekit.architecture.linear import is_linear
from prunekit.types import Run

Places = Mapping[str, Sequence[str]]
"""By linear module the names of all modules that use its matrix, a module of two names twice."""


def places_of(model: nn.Module, names: Iterable[str]) -> Places:
    """Where the matrices of the linear modules `names` are used, by these names."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module):
            users.setdefault(id(module.weight), []).append(name)
    return {name: users[id(model.get_submodule(name).weight)] for name in names}


def watched(model: nn.Module, places: Sequence[str]) -> list[str]:
    """One name of each module: a hook sees all of its calls."""
    found: dict[int, str] = {}
    for name in places:
        found.setdefault(id(model.get_submodule(name)), name)
    return list(found.values())


def reaching(run: Run, places: Places) -> Run:
    """`run`, or one over the whole model as it is now where `run` is over a block and some of the
    modules lie outside of it.
    """
    if not isinstance(run, BlockRun):
        return run
    block = f"{run.feed.blocks[run.block]}."
    inside = all(name.startswith(block) for names in places.values() for name in names)
    return run if inside else ModelRun(run.model, run.tokens)
