"""A part of a forward pass, noted operation by operation, to be run again on other tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class _Slot(NamedTuple):
    """Stands for a tensor that depends on what is fed in."""

    number: int


@dataclass(frozen=True)
class Replay:
    """The operations between the outputs of some modules and the input of another, to be run on
    other tensors.
    """

    operations: list[tuple[Any, Any, Any, list[int]]]
    inputs: dict[str, int]
    dims: int
    result: int

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """`(T, channels)` for `inputs`: module name -> its output `(T, outputs)`."""
        lead = (1,) * (self.dims - 2)
        slots = {
            n: inputs[name].clone().view(*lead, *inputs[name].shape)
            for name, n in self.inputs.items()
        }

        def fill(x: Any) -> Any:
            return slots[x.number] if isinstance(x, _Slot) else x

        for function, args, kwargs, numbers in self.operations:
            args, kwargs = tree_map(fill, (args, kwargs), is_leaf=_is_slot)
            slots.update(zip(numbers, _tensors(function(*args, **kwargs)), strict=True))
        return slots[self.result].flatten(0, -2)


def _is_slot(x: Any) -> bool:
    return isinstance(x, _Slot)


def _tensors(x: Any) -> list[Tensor]:
    return [t for t in tree_leaves(x) if isinstance(t, Tensor)]


class Span(NamedTuple):
    """From the outputs of some modules to the input of another, by their names."""

    starts: tuple[str, ...]
    end: str


class _Notes:
    """What has happened in one span so far."""

    def __init__(self) -> None:
        self.replay: Replay | None = None
        self.inputs: dict[str, int] = {}
        self.operations: list[tuple[Any, Any, Any, list[int]]] = []
        self.seen: list[Tensor] = []  # held, so that an id stays one tensor's
        self.numbers: dict[int, int] = {}

    def number(self, t: Tensor) -> int:
        if id(t) not in self.numbers:
            self.numbers[id(t)] = len(self.seen)
            self.seen.append(t)
        return self.numbers[id(t)]

    def started(self, name: str, x: Tensor) -> None:
        if self.replay is None:
            self.inputs[name] = self.number(x)

    def ended(self, x: Tensor) -> None:
        """What the end reads is `x`; where that comes from elsewhere, the next time may tell."""
        if self.replay is None and id(x) in self.numbers:
            self.replay = Replay(self.operations, self.inputs, x.dim(), self.numbers[id(x)])
        else:
            self.inputs, self.operations = {}, []
        self.seen, self.numbers = [], {}

    def noted(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        def slot(x: Any) -> Any:
            known = isinstance(x, Tensor) and id(x) in self.numbers
            return _Slot(self.numbers[id(x)]) if known else x

        if any(id(t) in self.numbers for t in _tensors((args, kwargs))):
            args, kwargs = tree_map(slot, (args, kwargs))
            numbers = [self.number(t) for t in _tensors(out)]
            self.operations.append((func, args, kwargs, numbers))


class _Recorder(TorchDispatchMode):
    """Shows every operation to the spans that have started."""

    def __init__(self, spans: Iterable[_Notes]) -> None:
        TorchDispatchMode.__init__(self)
        self.spans = list(spans)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for notes in self.spans:
            if notes.numbers:
                notes.noted(func, args, kwargs or {}, out)
        return out


@torch.no_grad()
def record(model: nn.Module, spans: Mapping[str, Span], passes: Iterable[Any]) -> dict[str, Replay]:
    """What runs in each span, by its name.

    Forwards are drawn from `passes` until every span has been reached. One that never is, or whose
    end takes nothing that comes from its starts, is left out.
    """
    notes = {name: _Notes() for name in spans}

    def after(started: Callable[[Tensor], None], module: nn.Module, args: Any, out: Tensor) -> None:
        started(out)

    def before(ended: Callable[[Tensor], None], module: nn.Module, args: Any) -> None:
        ended(args[0])

    hooks: list[Any] = []
    try:
        for name, span in spans.items():
            for start in span.starts:
                see = partial(after, partial(notes[name].started, start))
                hooks.append(model.get_submodule(start).register_forward_hook(see))
            end = model.get_submodule(span.end)
            hooks.append(end.register_forward_pre_hook(partial(before, notes[name].ended)))
        with _Recorder(notes.values()):
            for _ in passes:
                if all(n.replay for n in notes.values()):
                    break
    finally:
        for hook in hooks:
            hook.remove()
    return {name: n.replay for name, n in notes.items() if n.replay}
