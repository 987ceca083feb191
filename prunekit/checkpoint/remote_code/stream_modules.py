"""Modules that carry the residual stream from one basis to the next (SliceGPT). Written by prunekit
beside the weights; imports nothing of prunekit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .runtime_base import RuntimeModule, owner


def entered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def entering(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


class Rotation(RuntimeModule):
    """Carries the residual stream from one basis to the next; it lives in the module whose input or
    output it changes.

    Without `source` what enters the module is multiplied by `weight`. With it, `-(x @ weight) @
    weight.T` is added to what leaves the module, `x` being what entered `source`: in a block that
    computes `x + module(source(x))`, the sum's `x` becomes `x (I - w w^T)`.
    """

    def __init__(self, inputs: int, outputs: int, source: str = ""):
        super().__init__()
        self.source = source
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.held: Tensor | None = None

    def numbers(self) -> dict[str, Any]:
        inputs, outputs = self.weight.shape
        return {"inputs": inputs, "outputs": outputs, "source": self.source}

    def attach(self, model: nn.Module, path: str) -> None:
        module, _ = owner(model, path)
        if not self.source:
            module.register_forward_pre_hook(self.enter, with_kwargs=True)
            return
        source, _ = owner(model, f"{self.source}.weight")
        source.register_forward_pre_hook(self.hold, with_kwargs=True)
        module.register_forward_hook(self.leave)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)  # states may be wider: model.compute=float32
        turned = x @ weight
        return -(turned @ weight.T) if self.source else turned

    # The hooks call the module, not its weight: so what is hooked onto it (accelerate's offloading)
    # takes part.
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return entering(self(entered(args, kwargs)), args, kwargs)

    def hold(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.held = entered(args, kwargs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        change, self.held = self(self.held), None
        return out + change if isinstance(out, Tensor) else (out[0] + change, *out[1:])


class LateSum(RuntimeModule):
    """The output of the module that it lives in joins the residual stream only on entering
    `target`: the block's own sum adds zeros of `inputs` channels, and there `x @ weight` of
    `outputs` channels plus that output is what goes in. So the last sub-layer of a narrow stream
    writes at full width.
    """

    def __init__(self, inputs: int, outputs: int, target: str):
        super().__init__()
        self.target = target
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.held: Tensor | None = None

    def numbers(self) -> dict[str, Any]:
        inputs, outputs = self.weight.shape
        return {"inputs": inputs, "outputs": outputs, "target": self.target}

    def attach(self, model: nn.Module, path: str) -> None:
        module, _ = owner(model, path)
        target, _ = owner(model, f"{self.target}.weight")
        module.register_forward_hook(self.leave)
        target.register_forward_pre_hook(self.enter, with_kwargs=True)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype)

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        self.held = out if isinstance(out, Tensor) else out[0]
        nothing = self.held.new_zeros(*self.held.shape[:-1], self.weight.shape[0])
        return nothing if isinstance(out, Tensor) else (nothing, *out[1:])

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wide = self(entered(args, kwargs))
        if self.held is not None:
            wide, self.held = wide + self.held.to(wide.device), None
        return entering(wide, args, kwargs)
