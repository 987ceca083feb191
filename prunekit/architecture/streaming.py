"""A model that computes on a device on which it need not fit: its weights rest in host memory or in
mapped files, and each block (embeddings and head as well) is on the device for its turn.

A turn is a forward, by hooks, or whatever a method does to a block inside `turn`; then what changed
goes back. While a parameter is at work it is the same object, and only what it holds is elsewhere,
so that methods see an ordinary block on a device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.architecture.blocks import block_modules
from prunekit.architecture.mapped import RESTS, is_mapped, mapped, mapped_copy, release
from prunekit.architecture.prefetch import Ahead
from prunekit.errors import ConfigError

log = logging.getLogger("prunekit")
STANDS_IN = "_stands_in"
"""Name of the mark."""


def stream(model: nn.Module, device: torch.device | str) -> None:
    """From now on `model`, whose weights are in host memory or in files, computes on `device`.

    On CUDA what is in host memory is pinned, and the part that will run next is copied while one
    runs. Buffers, which are small, stay on the device.
    """
    place = torch.device(device)
    keep = _in_file if mapped(model) else _pinned if place.type == "cuda" else _in_host_memory
    for parameter in model.parameters():
        put(parameter, keep(parameter.data))
    ahead = Ahead(place) if keep is _pinned else None
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            module._buffers[leaf] = None if buffer is None else buffer.to(place)
    cover(model, _Streaming(place, keep, ahead))


def will_stream(options: Mapping[str, Any]) -> bool:
    """Whether the options of a model, `weights` and `device`, say that it will be streamed."""
    device = options.get("device")
    accelerated = device != "cpu" if device else torch.accelerator.is_available()
    weights = options.get("weights", "memory")
    return weights == "host" or (weights == "disk" and accelerated)


def cover(model: nn.Module, how: _Streaming | None) -> list[Any]:
    """The hooks by which those modules of `model` that have none yet compute as `how` says: each
    brings in the whole of it, but those that hold blocks only their own parameters.
    """
    if how is None:
        return []
    blocks = set(block_modules(model))
    handles: list[Any] = []
    for module in model.modules():
        if streaming(module) is None:
            whole = module in blocks or blocks.isdisjoint(module.modules())
            before, after = _Before(how, whole), _After(how)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            # Also where a forward is cut short: `raise_stop` does so.
            handles.append(module.register_forward_hook(after, always_call=True))
    return handles


def streaming(module: nn.Module) -> _Streaming | None:
    """How a model, or a module of it, is streamed; None where it is not."""
    hooks = module._forward_pre_hooks.values()
    return next((h.how for h in hooks if isinstance(h, _Before)), None)


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes, and its token ids go."""
    how = streaming(model)
    return next(model.parameters()).device if how is None else how.device


def outside_blocks(model: nn.Module) -> list[nn.Module]:
    """Embeddings, the last norm, the head: all that does not stand in a block. Empty for a model
    that is not streamed.
    """
    if streaming(model) is None:
        return []
    inside = {m for block in block_modules(model) for m in block.modules()}
    return [m for m in model.modules() if m not in inside]


@contextmanager
def turn(*modules: nn.Module) -> Iterator[None]:
    """Inside, blocks (or others that come as a whole) are on the device; afterwards all of them is
    back where it rests, as it is then. Nothing happens to those that are not streamed.
    """
    with ExitStack() as stack:
        for module in modules:
            how = streaming(module)
            if how is not None:
                how.enter(module)
                stack.callback(how.leave, module, changed=True)
        yield


def stands_in(module: nn.Module) -> bool:
    """Whether something without weights computes in a module's stead (see `without_weights`)."""
    return hasattr(module.__dict__.get("forward"), STANDS_IN)


def without_weights(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, marked as one that reads no weight of the module on which it is put."""
    setattr(forward, STANDS_IN, True)
    return forward


def put(parameter: Tensor, data: Tensor) -> None:
    """Let a parameter hold `data`."""
    parameter.data = data


@dataclass
class _Visit:
    """A parameter at work: where it rests, its version then, and how many turns it is in."""

    home: Tensor
    version: int
    turns: int = 1


@dataclass
class _Streaming:
    """Where a model computes, how `keep` puts a tensor where it rests, and what is at work."""

    device: torch.device
    keep: Callable[[Tensor], Tensor]
    ahead: Ahead | None = None
    visits: dict[Tensor, _Visit] = field(default_factory=dict)
    inside: dict[nn.Module, list[list[Tensor]]] = field(default_factory=dict)

    @torch.inference_mode(False)
    @torch.no_grad()
    def enter(self, module: nn.Module) -> bool:
        """Bring in all of a module that is not here yet; whether something was not."""
        found, resting = self.parameters(module), self.resting(module)
        self.inside.setdefault(module, []).append(found)
        copies = self.ahead.take(module, resting) if self.ahead and resting else []
        for p in found:
            if p in self.visits:
                self.visits[p].turns += 1
        for p, copied in zip_longest(resting, copies):
            home = p.data
            put(p, home.to(self.device, copy=True) if copied is None else copied)
            setattr(p, RESTS, home)
            self.visits[p] = _Visit(home, p._version)
            release([home])
        return bool(resting)

    @torch.inference_mode(False)
    @torch.no_grad()
    def leave(self, module: nn.Module, changed: bool) -> None:
        """Take a module out; with `changed` whatever is in it then, else what was written to."""
        if not self.inside.get(module):
            return  # its turn never began: the forward ended before
        for p in self.inside[module].pop():
            visit = self.visits[p]
            visit.turns -= 1
            if not visit.turns:
                del self.visits[p]
                self._take_out(p, visit, changed or p._version != visit.version)
        if not self.inside[module]:
            del self.inside[module]
        for p in self.resting(module) if changed else ():
            here = p.data
            kept = self.keep(here)
            if kept is not here:
                put(p, kept)

    def _take_out(self, p: Tensor, visit: _Visit, changed: bool) -> None:
        home, here = visit.home, p.data
        alike = home.shape == here.shape and home.dtype == here.dtype
        if changed and alike:
            home.copy_(here)
        delattr(p, RESTS)
        put(p, home if alike else self.keep(here))
        release([home])

    def resting(self, module: nn.Module) -> list[Tensor]:
        """What of a module is not at work."""
        return [p for p in self.parameters(module) if p not in self.visits]

    def parameters(self, module: nn.Module) -> list[Tensor]:
        """What of a module comes and goes with it. Weights that are converted for a forward
        (`model.compute`) are no parameters.
        """
        hooks = module._forward_pre_hooks.values()
        whole = next(h.whole for h in hooks if isinstance(h, _Before))
        held = module.modules() if whole else [module]
        owned = [p for m in held for p in m._parameters.values() if isinstance(p, nn.Parameter)]
        return list(dict.fromkeys(owned))


class _Before:
    """Brings a module in before its forward, and its arguments to the device."""

    def __init__(self, how: _Streaming, whole: bool):
        self.how, self.whole = how, whole

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        how = self.how
        if stands_in(module):
            how.inside.setdefault(module, []).append([])
        else:
            if resting := how.resting(module):
                _check_gradients([*resting, *args, *kwargs.values()], how)
            if how.enter(module) and how.ahead:
                how.ahead.begin(module, how.resting)

        def moved(value: Any) -> Any:
            return value.to(how.device) if isinstance(value, Tensor) else value

        return tuple(map(moved, args)), {k: moved(v) for k, v in kwargs.items()}

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing  # a copy is an ordinary module where its weights are


class _After:
    """Takes a module out after its forward."""

    def __init__(self, how: _Streaming):
        self.how = how

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        self.how.leave(module, changed=False)

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing


def _check_gradients(needed: Sequence[Any], how: _Streaming) -> None:
    """Raises ConfigError where a backward would need a module's weights after their turn, since
    some of what it needs asks for gradients.
    """
    if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in needed):
        raise ConfigError(
            f"model.weights brings one block at a time to {how.device}, and here a backward needs "
            "the whole model on it: give model.weights=memory, criterion.by_block=true where there "
            "is one, or another method"
        )


def _nothing(*_: Any) -> None:
    """The hook of a copy."""


def _in_file(tensor: Tensor) -> Tensor:
    return tensor if is_mapped(tensor) else mapped_copy(tensor)


def _in_host_memory(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "cpu" else tensor.to("cpu")


def _pinned(tensor: Tensor) -> Tensor:
    """In memory that a GPU reads by itself, as far as the system has it."""
    here = _in_host_memory(tensor)
    try:
        return here if here.is_pinned() else here.pin_memory()
    except RuntimeError as error:
        _warn_once(f"some weights stay in ordinary memory, which a GPU reads slowly: {error}")
        return here


@cache
def _warn_once(words: str) -> None:
    log.warning(words)
