"""Watching activations: hooks that always come off, and the pass of the text that feeds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.types import Run

Observer = Callable[[Tensor], None]
"""Called with an activation `(N, T, channels)`; it must not keep or change it."""


def first_tensor(args: Any, kwargs: Mapping[str, Any] | None = None) -> Tensor:
    """The activation among a module's arguments or results: transformers passes it first, or as
    `hidden_states`.
    """
    found = args
    if isinstance(args, (tuple, list)):
        found = args[0] if args else (kwargs or {})["hidden_states"]
    assert isinstance(found, Tensor)
    return found


@contextmanager
def hook_activations(
    model: nn.Module,
    inputs: Mapping[str, Observer] | None = None,
    outputs: Mapping[str, Observer] | None = None,
) -> Iterator[None]:
    """Inside, the modules named show each input (or output) to their function, detached. The hooks
    come off whatever happens.
    """

    def before(see: Observer, module: nn.Module, args: Any, kwargs: Any) -> None:
        see(first_tensor(args, kwargs).detach())

    def after(see: Observer, module: nn.Module, args: Any, out: Any) -> None:
        see(first_tensor(out).detach())

    hooks: list[Any] = []
    try:
        for name, see in (inputs or {}).items():
            module = model.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(partial(before, see), with_kwargs=True))
        for name, see in (outputs or {}).items():
            hooks.append(model.get_submodule(name).register_forward_hook(partial(after, see)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def pass_tokens(run: Run, what: str) -> None:
    """Push all calibration tokens through for the sake of hooks; `what` names the progress bar,
    which counts samples.
    """
    with tqdm(total=len(run.tokens), desc=what, unit="sample", leave=False) as bar:
        for samples in run.forward():
            bar.update(samples)


class _Stop(Exception):
    """The forward has shown what was wanted; the rest need not run."""


@contextmanager
def stop_early() -> Iterator[None]:
    """A forward inside may be cut short by `raise_stop()`; nothing else is caught."""
    try:
        yield
    except _Stop:
        return


def raise_stop() -> None:
    """End the forward around which `stop_early` stands."""
    raise _Stop
