"""A device that is none: tensors that say they are on it compute on the CPU, refuse to be mixed
with the CPU's as those of a GPU do, and count how often the host waits for them.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("lazy")
"""A name that torch knows and nothing treats as special."""
aten = torch.ops.aten
WAIT = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.is_nonzero.default,
}
"""Operators whose answer the host needs before it goes on."""
NOT_REPEATABLE = {
    aten.kthvalue.default: "kthvalue CUDA",
    aten.cumsum.default: "cumsum_cuda_kernel",
}
"""Operators that a GPU refuses under deterministic algorithms, the second of floats, and what it
calls them.
"""
TAKE_HOST_INDICES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class Elsewhere(Tensor):
    """A tensor whose values are those of `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Operators(TorchDispatchMode):
    """Lets operators make tensors on `DEVICE`; `waits` counts by line of prunekit."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, _ = tree_flatten((args, kwargs))
        there = any(isinstance(t, Elsewhere) for t in flat)
        target = (kwargs or {}).get("device")
        to_host = there and func is aten._to_copy.default and target == torch.device("cpu")
        if there and (func in WAIT or to_host or boolean_index(func, args)):
            self.waits[line()] += 1
        return dispatch(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    """Numbers of Python reach `DEVICE` through the CPU: no operator makes them there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and on_it(named.get("device")):
            return func(*args, **named | {"device": "cpu"}).to(named["device"])
        if func is Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].cpu().tolist()
        return func(*args, **named)


def on_it(device: Any) -> bool:
    """Whether a device, or its name, is `DEVICE`."""
    return device is not None and torch.device(device).type == DEVICE.type


@contextmanager
def other_device() -> Iterator[Counter[str]]:
    """While it is open, tensors can be put on `DEVICE`. Gives the waits, by line of prunekit."""
    autocast = torch.autocast
    operators = Operators()

    def known(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if on_it(device_type) else device_type, *args, **kwargs)

    torch.autocast = known  # type: ignore[misc, assignment]
    # torch.utils.checkpoint asks the device's module for its random numbers.
    torch.lazy = SimpleNamespace(_initialized=False)  # type: ignore[attr-defined]
    try:
        with operators, Literals():
            yield operators.waits
    finally:
        torch.autocast = autocast  # type: ignore[misc]
        del torch.lazy  # type: ignore[attr-defined]


def boolean_index(func: Any, args: Any) -> bool:
    """Whether an index is a mask, whose size the host must learn."""
    if func not in TAKE_HOST_INDICES:
        return False
    return any(t is not None and t.dtype is torch.bool for t in args[1])


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the operator gives, on the device on which its tensors are."""
    flat, spec = tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, Elsewhere)]
    # Inside inference_mode it is an argument without a name.
    target = kwargs.get("device", next((a for a in args if isinstance(a, torch.device)), None))
    if there and len(there) < len(tensors):
        check_mixed(func, args, tensors)
    if there and torch.are_deterministic_algorithms_enabled():
        check_repeatable(func, args)
    plain = [t.held if isinstance(t, Elsewhere) else t for t in flat]
    if on_it(target):
        plain = [torch.device("cpu") if isinstance(x, torch.device) else x for x in plain]
    inner, named = tree_unflatten(plain, spec)
    if func is aten.histc.default:  # a GPU counts integers, of which the CPU knows nothing
        inner = (inner[0].float(), *inner[1:])
    out = func(*inner, **named)
    lands = on_it(target) if target is not None else bool(there)
    if not lands:
        return out
    mutated = {id(t.held): t for t in there}
    return tree_map(lambda t: mutated.get(id(t), Elsewhere(t)) if isinstance(t, Tensor) else t, out)


def check_mixed(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raises RuntimeError for tensors of two devices, where a GPU would: single numbers, indices
    and copies may come from the host.
    """
    host = [t for t in tensors if not isinstance(t, Elsewhere)]
    if func in (aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor):
        return
    if func in TAKE_HOST_INDICES:
        if not isinstance(args[0], Elsewhere):
            raise RuntimeError(f"{func}: indices on {DEVICE} for a tensor of the CPU")
        host = [t for t in host if all(t is not i for i in args[1])]
    if any(t.dim() for t in host) or func in (aten.cat.default, aten.stack.default):
        raise RuntimeError(f"{func}: tensors on {DEVICE} and on the CPU")


def check_repeatable(func: Any, args: Any) -> None:
    """Raises RuntimeError, in torch's words, for what has no deterministic form on a GPU."""
    name = NOT_REPEATABLE.get(func)
    if name and args[0].is_floating_point():
        raise RuntimeError(f"{name} does not have a deterministic implementation, but you set it")


def line() -> str:
    """Where in prunekit the code is that is at work."""
    for frame in reversed(traceback.extract_stack()):
        if "/prunekit/" in frame.filename:
            return f"{frame.filename.rpartition('/prunekit/')[2]}:{frame.lineno}"
    return "elsewhere"
