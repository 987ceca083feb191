"""Experts in one tensor, in code that hands their routing to nobody: what each puts out, and with
what weight that is added, from watching which operations read an expert's part of the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunekit.activations.hooks import first_tensor
from prunekit.scoring.listed_experts import ListedCall, weighed
from prunekit.types import Member, tensor_of

MIXES_AXES = (torch.einsum, torch.tensordot)
"""Functions whose result says by no axis which expert it is of."""


class CutAtExperts(TorchFunctionMode):
    """Inside, what an operation makes of an expert's weights begins a new graph.

    `outputs` are these beginnings, each with its expert: the last of an expert is its output, and
    only this one has a derivative, for the graphs of those before it end there.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self.outputs: list[tuple[int, Tensor]] = []
        self.held = {t.untyped_storage().data_ptr(): t for t in tensors}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or not out.is_floating_point() or self._is_view(out):
            return out
        if func in MIXES_AXES:
            return out
        for given in (*args, *kwargs.values()):
            if isinstance(given, Tensor) and self._is_view(given):
                return self._cut(given, out)
        return out

    def _is_view(self, t: Tensor) -> bool:
        return t.untyped_storage().data_ptr() in self.held

    def _cut(self, given: Tensor, out: Tensor) -> Tensor:
        whole = self.held[given.untyped_storage().data_ptr()]
        size = whole.stride(0)
        if given.dim() == out.dim() and given.shape[0] == len(whole) == len(out):
            parts = [out[e].detach().requires_grad_() for e in range(len(whole))]
            self.outputs += enumerate(parts)
            return torch.stack(parts)
        extent = sum((n - 1) * s for n, s in zip(given.shape, given.stride(), strict=True))
        expert, start = divmod(int(given.storage_offset() - whole.storage_offset()), size)
        if start + extent >= size:  # of several experts
            return out
        begun = out.detach().requires_grad_()
        self.outputs.append((expert, begun))
        return begun.clone()  # which may be written to in place


def traced_calls(
    model: nn.Module,
    members: Sequence[Member],
    module: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
) -> list[ListedCall]:
    """Calls `module`, inside which are a router and the experts in `members`, again with the same
    arguments; `expert` is the number by which the router names it. Empty where the experts do not
    lie one after the other, and where the output is no sum of theirs with a weight for each token.

    A row of zeros is a token that the code leaves out, and gets the weight 0. Where the weight is
    multiplied with what the experts read (Llama 4), the output holds it already and g is 1.
    """
    tensors = [tensor_of(model, m.param) for m in members]
    # Of a model that accelerate spread, weights come when their own module is called.
    if any(m.axis != 0 or t.is_meta for m, t in zip(members, tensors, strict=True)):
        return []
    mode = CutAtExperts(tensors)
    with torch.enable_grad(), mode:
        total = first_tensor(module.forward(*args, **kwargs)).float().sum()
    calls = weighed(total, mode.outputs)
    return [c._replace(g=c.g * (c.f != 0).any(1)) for c in calls]
