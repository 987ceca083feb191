"""The reference for removal: a forward pass in which statistics (means, norms, softmax, top-k) run
over the kept channels only.

So does the width that fused attention divides by, where that is the width at hand: classes that
score residual channels read it off the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.graph.labels import Op
from prunekit.graph.rules import reduced_dims
from prunekit.graph.trace import Trace

STATISTICS = frozenset(
    "mean var std var_mean native_layer_norm _fused_rms_norm native_group_norm amax max amin min "
    "_softmax _log_softmax softmax _safe_softmax "
    "topk argmax sort".split()
)


class Masked(Trace):
    """Labels that know which of them are removed: `gone` lists `(tensor name, dim, indices)`."""

    def __init__(
        self,
        model: nn.Module,
        skip: frozenset[tuple[str, int]],
        gone: Iterable[tuple[str, int, Tensor]],
    ):
        super().__init__(model, skip)
        base = {(a.name, a.dim): a.base for a in self.axes}
        self._gone = np.zeros(self.next, dtype=bool)
        for name, dim, index in gone:
            if (name, dim) in base:
                self._gone[base[name, dim] + index.numpy()] = True

    def _grow(self) -> None:
        if len(self._gone) < self.next:
            self._gone = np.concatenate(
                [self._gone, np.zeros(self.next + 1024 - len(self._gone), dtype=bool)]
            )

    def set_label(self, members: np.ndarray) -> int:
        label = super().set_label(members)
        self._grow()
        if label:
            self._gone[label] = self._gone[members[members > 0]].all()
        return label

    def _pair_labels(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        labels = super()._pair_labels(a, b)
        self._grow()
        self._gone[labels] |= self._gone[a] | self._gone[b]
        return labels

    def execute(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name.startswith("_scaled_dot_product"):
            return func(*args, **{**kwargs, **self._scale(args[0], kwargs.get("scale"))})
        if name not in STATISTICS or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        x = args[0]
        dims = reduced_dims(Op(name, func, args, kwargs, [x], [], False))
        if dims is None:
            return func(*args, **kwargs)
        keep = torch.ones((), dtype=torch.bool)
        for f in self.fields(x):
            if any(f.size(d) > 1 for d in dims):
                keep = keep & ~torch.from_numpy(self._gone[f.numpy()])
        if bool(keep.all()):
            return func(*args, **kwargs)
        keep = keep.expand(x.shape)
        if name in ("mean", "var", "std", "var_mean"):
            return _moments(name, x, keep, dims, args, kwargs)
        if "norm" in name:
            return _norm(name, x, keep, dims, args)
        low = name not in ("amin", "min")
        return func(x.masked_fill(~keep, -1e9 if low else 1e9), *args[1:], **kwargs)

    def _scale(self, q: Tensor, scale: float | None) -> dict[str, float]:
        """The scale of attention over the kept channels, where the one given is that over all."""
        n = q.shape[-1]
        lost = [torch.from_numpy(self._gone[f.numpy()]) for f in self.fields(q) if f.size(-1) == n]
        gone = max((int(g.reshape(-1, n).all(0).sum()) for g in lost), default=0)
        return (
            {"scale": (n - gone) ** -0.5}
            if gone and (scale is None or abs(scale - n**-0.5) < 1e-6)
            else {}
        )


def _moments(
    name: str,
    x: Tensor,
    keep: Tensor,
    dims: list[int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    keepdim = kwargs.get("keepdim", args[2] if name == "mean" and len(args) > 2 else False)
    n = keep.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * keep).sum(dims, keepdim=True) / n
    correction = kwargs.get("correction", 1)
    var = ((x - mean) ** 2 * keep).sum(dims, keepdim=True) / (
        n - (1 if correction is None else correction)
    )
    results = {"mean": mean, "var": var, "std": var.sqrt()}
    results = results if keepdim else {k: v.squeeze(dims) for k, v in results.items()}
    return (results["var"], results["mean"]) if name == "var_mean" else results[name]


def _norm(name: str, x: Tensor, keep: Tensor, dims: list[int], args: tuple[Any, ...]) -> Any:
    if name == "native_group_norm":
        weight, bias, groups, eps = args[1], args[2], args[6], args[7]
        split, parts = x.reshape(x.size(0), groups, -1), keep.reshape(x.size(0), groups, -1)
        y, mean, rstd = _standardise(split, parts, [2], eps, centre=True)
        y = y.reshape(x.shape)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        weight, bias = (None if t is None else t.reshape(shape) for t in (weight, bias))
    else:
        centre = name == "native_layer_norm"
        weight, bias = args[2], args[3] if centre else None
        eps = args[4] if centre else args[3]
        y, mean, rstd = _standardise(
            x, keep, dims, torch.finfo(x.dtype).eps if eps is None else eps, centre
        )
    y = y if weight is None else y * weight
    y = (y if bias is None else y + bias) * keep
    return (y, rstd) if name == "_fused_rms_norm" else (y, mean, rstd)


def _standardise(
    x: Tensor, keep: Tensor, dims: list[int], eps: float, centre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n = keep.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * keep).sum(dims, keepdim=True) / n if centre else torch.zeros_like(n, dtype=x.dtype)
    rstd = torch.rsqrt(((x - mean) ** 2 * keep).sum(dims, keepdim=True) / n + eps)
    return (x - mean) * rstd, mean, rstd
