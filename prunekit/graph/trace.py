"""One traced forward pass: every ATen call runs, then its rule says what it does to labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunekit.graph import movement_rules  # noqa: F401  (its import files its rules)
from prunekit.graph.labels import Labels, Op
from prunekit.graph.rules import CREATES, apply

NEUTRAL = {
    "t",
    "transpose",
    "permute",
    "expand",
    "detach",
    "alias",
    "unsqueeze",
    "squeeze",
    "_conj",
}
"""Views that show no new extent."""
CHOOSES = {"max", "min", "topk", "sort", "argsort", "argmax", "argmin", "multinomial", "nonzero"}
"""Ops whose integer results depend on values."""


class Trace(Labels, TorchDispatchMode):
    """Follow labels through whatever runs inside the `with`."""

    def __init__(self, model: nn.Module, skip: frozenset[tuple[str, int]] = frozenset()):
        Labels.__init__(self, model, skip)
        TorchDispatchMode.__init__(self)

    def execute(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        out = self.execute(base, func, args, kwargs)
        if base in ("view_as_complex", "view_as_real"):
            out = out.clone()
        ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self._alive += outs
        self._note_chosen(base, ins, outs)
        if not outs or base in CREATES or not any(self.labelled(t) for t in ins):
            return out
        op = Op(base, func, args, kwargs, ins, outs, func._schema.is_mutable)
        storages = {t.untyped_storage()._cdata for t in ins}
        if not op.mutable and all(t.untyped_storage()._cdata in storages for t in outs):
            if base not in NEUTRAL:
                for f in [f for t in outs for f in self.fields(t)]:
                    self.note(f)
        else:
            apply(self, op)
        return out

    def _note_chosen(self, name: str, ins: list[Tensor], outs: list[Tensor]) -> None:
        """Integers that say what data chose (token ids, top-k, and what is computed from them):
        indexing by them follows no channel.
        """
        if name in CHOOSES or any(t.untyped_storage()._cdata in self._chosen for t in ins):
            self._chosen |= {t.untyped_storage()._cdata for t in outs if not t.is_floating_point()}


def trace(
    model: nn.Module, inputs: dict[str, Any], labels: Trace | None = None
) -> tuple[Trace, Any]:
    """One forward pass under `labels` (default: fresh ones), recording for each op the module in
    which it ran.
    """
    labels = labels or Trace(model)
    hooks = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            labels.scope.append(name)
            for where, t in [*enumerate(args), *kwargs.items()]:
                if name and isinstance(t, Tensor) and t.dim():
                    labels.arguments[t.untyped_storage()._cdata].append(
                        (name, where, tuple(t.shape))
                    )

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            labels.scope.pop()

        hooks += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]
    try:
        labels._chosen |= {
            t.untyped_storage()._cdata for t in inputs.values() if isinstance(t, Tensor)
        }
        with torch.no_grad(), labels:
            output = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return labels, output
