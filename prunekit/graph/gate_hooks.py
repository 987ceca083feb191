"""The hooks that multiply units by z: at the input or output of a module, on a parameter while its
module runs, at a norm, at a router, around a block.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from prunekit.graph.block_lists import block_lists
from prunekit.graph.masks import stream_in, stream_out, with_stream
from prunekit.graph.sample_run import ERRORS
from prunekit.graph.skeleton import clone
from prunekit.graph.slicing import holders
from prunekit.types import tensor_of


class Gate:
    """A hook that `gated` put on a module; what is known about a model does not depend on it."""


@dataclass(frozen=True, eq=False)
class Scale:
    """z spread over an axis: `z[unit[i]]` at index i, 1 where `unit[i]` is the number of units."""

    z: Tensor
    unit: Tensor

    @staticmethod
    def over(size: int, index: Tensor, z: Tensor) -> Scale:
        """For an axis of `size` on which unit u owns `index[u]`."""
        unit = torch.full((size,), len(index), dtype=torch.int64)
        unit[index] = torch.arange(len(index))[:, None].expand_as(index)
        return Scale(z, unit.to(z.device))

    def __call__(self, like: Tensor, axis: int = -1) -> Tensor:
        """Shaped to multiply `like` along `axis`."""
        full = torch.cat([self.z, self.z.new_ones(1)])[self.unit].to(like.device, like.dtype)
        return full.reshape(tuple(-1 if d == axis % like.dim() else 1 for d in range(like.dim())))


@dataclass(frozen=True, eq=False)
class InputGate(Gate):
    """What enters a linear module, times z."""

    scale: Scale

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * self.scale(args[0]), *args[1:])


@dataclass(frozen=True, eq=False)
class OutputGate(Gate):
    """What a module returns, times z."""

    scale: Callable[[Tensor], Tensor]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * self.scale(output)


@dataclass(frozen=True, eq=False)
class BlockGate(Gate):
    """`input + z (output - input)`; exact at 0 and at 1."""

    z: Tensor

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        made = stream_out(output)
        given = stream_in(args, kwargs).to(made)
        return with_stream(output, torch.lerp(given, made, self.z.to(made)))


# ---- norms


class NormStyle(NamedTuple):
    """`offset`: what a LayerNorm adds to its weight, 0 or 1. Where `centres` is false a channel of
    zeros leaves the norm as zeros (RMSNorm).
    """

    centres: bool
    offset: float = 0.0
    eps: float = 0.0


@dataclass(frozen=True, eq=False)
class NormGate(Gate):
    """After a LayerNorm: what a channel gets from the mean of all channels and from the bias, times
    z. What it gets from its own input was multiplied where that was written.
    """

    scale: Scale
    style: NormStyle

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
        gain, bias = gain_and_bias(module, self.style.offset)
        rate = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + self.style.eps)
        rest = bias - gain * x.mean(-1, keepdim=True) * rate
        return output - ((1 - self.scale(rest)) * rest).to(output.dtype)


def gain_and_bias(norm: nn.Module, offset: float) -> tuple[Tensor | float, Tensor | float]:
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    gain = 1.0 if weight is None else weight.float() + offset
    return gain, 0.0 if bias is None else bias.float()


@torch.no_grad()
def norm_style(norm: nn.Module, width: int) -> NormStyle | None:
    """Tried on a copy with random gains; None for a module that is neither RMSNorm nor
    LayerNorm.
    """
    draw = torch.Generator().manual_seed(0)
    probe = clone(norm, lambda t: torch.rand(t.shape, generator=draw)).float()
    x = torch.randn(4, width, generator=draw)
    x[:, ::2] = 0
    try:
        seen = probe(x)
        if not bool(seen[:, ::2].any()):
            return NormStyle(False)
        for eps in [*(v for k, v in vars(norm).items() if "eps" in k and type(v) is float), 1e-5]:
            for offset in (0.0, 1.0):
                gain, bias = gain_and_bias(probe, offset)
                expected = F.layer_norm(x, (width,), eps=eps) * gain + bias
                if torch.allclose(seen, expected, atol=1e-5):
                    return NormStyle(True, offset, eps)
    except ERRORS:
        pass
    return None


# ---- parameters


Factor = Callable[[Tensor], Tensor]
"""A tensor -> what stands in its place while its module runs."""
Store = dict[str, Any]
"""Where a module keeps a tensor: its parameters, its buffers, or its attributes."""


class ParameterGate(Gate):
    """Tensors are replaced when a module's forward begins and put back when it ends."""

    def __init__(self) -> None:
        self.factors: list[tuple[Store, str, Factor]] = []
        self._held: list[tuple[Store, str, Tensor]] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        for store, leaf, factor in self.factors:
            self._held.append((store, leaf, store[leaf]))
            store[leaf] = factor(store[leaf])

    def leave(self, *_: Any) -> None:
        while self._held:
            store, leaf, tensor = self._held.pop()
            store[leaf] = tensor


class RouterGate(Gate, TorchFunctionMode):
    """While a router runs: experts of z = 0 get the lowest logit there is, where tokens meet the
    router's weight.
    """

    def __init__(self, weight: Callable[[], Tensor], scale: Scale):
        super().__init__()
        self.weight, self.scale = weight, scale
        self._followed: list[Tensor] = []
        self._active = ExitStack()

    def enter(self, module: nn.Module, args: Any) -> None:
        self._followed = [self.weight()]
        self._active.enter_context(self)

    def leave(self, *_: Any) -> None:
        self._active.close()
        self._followed = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [a for a in [*args, *(kwargs or {}).values()] if isinstance(a, Tensor)]
        if not isinstance(out, Tensor) or not any(a is w for a in given for w in self._followed):
            return out
        experts = len(self.scale.unit)
        if len(given) > 1 and out.shape[-1:] == (experts,):
            return lowest_where_zero(out, self.scale)
        if out.numel() == self._followed[0].numel():  # cast or transposed
            self._followed.append(out)
        return out


def lowest_where_zero(t: Tensor, scale: Scale) -> Tensor:
    return t.masked_fill(scale(t) == 0, torch.finfo(t.dtype).min)


# ---- putting hooks on


class Hooks:
    """Hooks on a model's modules, and how to take all of them off."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._handles: list[RemovableHandle] = []
        self._swaps: dict[nn.Module, ParameterGate] = {}
        self._routers: list[RouterGate] = []
        self._styles: dict[tuple[type, int], NormStyle | None] = {}

    def before(self, module: nn.Module, gate: InputGate) -> None:
        self._handles.append(module.register_forward_pre_hook(gate))

    def after(self, module: nn.Module, gate: OutputGate | NormGate) -> None:
        self._handles.append(module.register_forward_hook(gate))

    def around(self, block: nn.Module, gate: BlockGate) -> None:
        self._handles.append(block.register_forward_hook(gate, with_kwargs=True))

    def replace(self, name: str, by: Factor) -> None:
        """Whatever holds the tensor has `by(tensor)` while its part of the block (attention, FFN)
        runs. Not only itself: code of experts reads parameters of its submodules. Not the whole
        block: checkpointing recomputes a block without running its hooks.
        """
        for module, leaf, store in self._holders[id(tensor_of(self.model, name))]:
            scope = self._part_of.get(module, module)
            if scope not in self._swaps:
                self._swaps[scope] = ParameterGate()
                self._during(scope, self._swaps[scope])
            self._swaps[scope].factors.append((store, leaf, by))

    def route(self, router: nn.Module, gate: RouterGate) -> None:
        self._routers.append(gate)
        self._during(router, gate)

    def style(self, norm: nn.Module, width: int) -> NormStyle | None:
        """`norm_style`, tried once for a class."""
        key = (type(norm), width)
        if key not in self._styles:
            self._styles[key] = norm_style(norm, width)
        return self._styles[key]

    def remove(self) -> None:
        gates: list[ParameterGate | RouterGate] = [*self._swaps.values(), *self._routers]
        for gate in gates:
            gate.leave()
        for handle in self._handles:
            handle.remove()

    def _during(self, scope: nn.Module, gate: ParameterGate | RouterGate) -> None:
        """What enters last leaves first, also of several `gated` inside each other."""
        self._handles.append(scope.register_forward_pre_hook(gate.enter))
        self._handles.append(
            scope.register_forward_hook(gate.leave, prepend=True, always_call=True)
        )

    @cached_property
    def _holders(self) -> dict[int, list[tuple[nn.Module, str, Store]]]:
        return holders(self.model)

    @cached_property
    def _part_of(self) -> dict[nn.Module, nn.Module]:
        paths = [f"{path}.{i}" for path, n in block_lists(self.model).items() for i in range(n)]
        parts = [part for path in paths for part in self.model.get_submodule(path).children()]
        return {module: part for part in parts for module in part.modules()}
