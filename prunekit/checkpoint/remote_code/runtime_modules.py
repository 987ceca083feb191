"""Modules that a pruned model has where its class has none, or another: each one is built from a
kind and a few numbers, and its tensors lie among the weights.

Written by prunekit beside the weights; imports nothing of prunekit. A new kind is one class here
and one row of `KINDS`: a pruner puts the module into the model with `insert`, saving finds it by
its class, loading builds it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .early_exit import EarlyExit
from .runtime_base import LAYOUT, RuntimeModule, owner
from .stream_modules import LateSum, Rotation


class Bypass(RuntimeModule):
    """Stands where a sub-layer was removed: adds nothing to the residual stream. `outputs` > 1
    gives a tuple padded with None.
    """

    def __init__(self, outputs: int = 1):
        super().__init__()
        if not 1 <= outputs <= 16:
            raise ValueError(f"outputs is {outputs!r}; possible: 1 to 16")
        self.outputs = outputs

    def numbers(self) -> dict[str, Any]:
        return {"outputs": self.outputs}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        nothing = torch.zeros_like(hidden_states)
        return nothing if self.outputs == 1 else (nothing, *[None] * (self.outputs - 1))


class Gather(RuntimeModule):
    """A linear module that reads its input's channels `index (inputs,)`, in that order: a
    permutation, or fewer channels.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias)
        self.index: Tensor
        self.register_buffer("index", torch.zeros(inputs, dtype=torch.int64))

    @classmethod
    def before(cls, linear: nn.Linear, index: Tensor) -> Gather:
        """`linear`, as it is, on `x[..., index]`."""
        gather = cls(1, 1)
        gather.linear = linear
        gather.index = index.to(linear.weight.device, torch.int64)
        return gather.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs) for inputs in their own order, for code that reads it by name (GPT-2's
        initialisation). Raises AttributeError where some inputs are not read.
        """
        if not self.index.is_meta and int(self.index.max()) >= len(self.index):
            raise AttributeError("a gather of fewer channels stands for no matrix of all inputs")
        return self.linear.weight[:, self.index.argsort()]

    def numbers(self) -> dict[str, Any]:
        outputs, inputs = self.linear.weight.shape
        return {"inputs": inputs, "outputs": outputs, "bias": self.linear.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.index_select(-1, self.index))
        return out


class LowRank(RuntimeModule):
    """A linear module stored as two factors: `left(right(x))`."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool = False):
        super().__init__()
        self.right = nn.Linear(inputs, rank, bias=False)
        self.left = nn.Linear(rank, outputs, bias)

    @classmethod
    def of(cls, left: Tensor, right: Tensor, bias: Tensor | None = None) -> LowRank:
        """The module of weight `left (outputs, rank) @ right (rank, inputs)`."""
        (outputs, rank), inputs = left.shape, right.shape[1]
        with torch.device("meta"):
            factors = cls(inputs, outputs, rank, bias is not None)
        # As a loader lays them out: strides decide the last bit of a product.
        factors.left.weight = nn.Parameter(left.contiguous())
        factors.right.weight = nn.Parameter(right.contiguous())
        if bias is not None:
            factors.left.bias = nn.Parameter(bias)
        return factors

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs) the product, for code that reads it by name."""
        return self.left.weight @ self.right.weight

    def numbers(self) -> dict[str, Any]:
        (outputs, rank), inputs = self.left.weight.shape, self.right.weight.shape[1]
        bias = self.left.bias is not None
        return {"inputs": inputs, "outputs": outputs, "rank": rank, "bias": bias}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.left(self.right(x))
        return out


class ArgumentIndices(RuntimeModule):
    """Lets the module that it lives in see only the indices `keep` along one axis of an argument
    that is computed elsewhere (ALiBi slopes of the heads that stay).

    `argument` is a position or a keyword. Where the axis holds several runs of `size` (a batch
    flattened into it), each run is indexed.
    """

    def __init__(self, argument: int | str, axis: int, size: int, keep: list[int]):
        super().__init__()
        if type(argument) not in (int, str) or type(axis) is not int:
            raise ValueError(f"argument {argument!r} or axis {axis!r} is not one")
        if not all(type(k) is int and 0 <= k < size for k in keep):
            raise ValueError(f"keep must hold numbers from 0 to {size - 1}")
        self.argument, self.axis, self.size, self.keep = argument, axis, size, keep

    def numbers(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("argument", "axis", "size", "keep")}

    def attach(self, model: nn.Module, path: str) -> None:
        owner(model, path)[0].register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        at = self.argument
        if isinstance(at, int):
            tensor = args[at] if at < len(args) else None
        else:
            tensor = kwargs.get(at)
        if not isinstance(tensor, Tensor) or tensor.shape[self.axis] % self.size:
            return None
        runs = torch.arange(tensor.shape[self.axis] // self.size, device=tensor.device)
        keep = torch.tensor(self.keep, device=tensor.device)
        tensor = tensor.index_select(self.axis, (runs[:, None] * self.size + keep).flatten())
        if isinstance(at, int):
            return (*args[:at], tensor, *args[at + 1 :]), kwargs
        return args, {**kwargs, at: tensor}


KINDS: dict[str, type[RuntimeModule]] = {
    "bypass": Bypass,
    "gather": Gather,
    "low_rank": LowRank,
    "rotation": Rotation,
    "late_sum": LateSum,
    "argument_indices": ArgumentIndices,
    "early_exit": EarlyExit,
}
"""What `kind` in config.json may say."""


def kind_of(module: nn.Module) -> str | None:
    """The kind of a run-time module, None for every other module. Raises ValueError for a class
    that is not in `KINDS`.
    """
    # By name: a model loaded with trust_remote_code has classes of its own copy of this file.
    names = [cls.__name__ for cls in type(module).__mro__]
    if "RuntimeModule" not in names:
        return None
    kinds = [kind for kind, cls in KINDS.items() if cls.__name__ == names[0]]
    if not kinds:
        raise ValueError(f"{names[0]} is a run-time module that KINDS does not list")
    return kinds[0]


def insert(model: nn.Module, path: str, module: RuntimeModule) -> None:
    """Put a run-time module at `path`, in place of a module or as a new child of one. Raises
    ValueError where something else has that name.
    """
    parent, leaf = owner(model, path)
    before = parent._modules.get(leaf)
    if not leaf.isidentifier() and leaf not in parent._modules:
        raise ValueError(f"config.json: {LAYOUT}.modules: {path!r} is no name of a module")
    if before is None and hasattr(parent, leaf):
        raise ValueError(f"config.json: {LAYOUT}.modules: {path!r} is not a module")
    if isinstance(before, RuntimeModule) and type(before).attach is not RuntimeModule.attach:
        raise ValueError(f"{path} is a {kind_of(before)} already, whose hooks would remain")
    setattr(parent, leaf, module.train(parent.training))
    module.attach(model, path)


def build_modules(model: nn.Module, entries: list[dict[str, Any]]) -> None:
    """Insert the modules of which `describe_modules` gave the `entries`. Raises ValueError for an
    unknown kind and for numbers that it cannot be built from.
    """
    for entry in entries:
        numbers = {k: v for k, v in entry.items() if k not in ("path", "kind")}
        path, kind = str(entry.get("path")), str(entry.get("kind"))
        if kind not in KINDS:
            raise ValueError(
                f"config.json: {LAYOUT}.modules: {path!r} has the kind {kind!r}; known are "
                f"{', '.join(KINDS)}"
            )
        try:
            module = KINDS[kind](**numbers)
        except (TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"config.json: {LAYOUT}.modules: {path!r}: {error}") from None
        insert(model, path, module)


def describe_modules(model: nn.Module) -> list[dict[str, Any]]:
    """Path, kind and numbers of every run-time module, outer ones first."""
    found = []
    for path, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None:
            numbers: Any = module.numbers  # a RuntimeModule, if only by name
            found.append({"path": path, "kind": kind, **numbers()})
    return found
