"""The RMSNorm correction: over fewer channels the mean square is taken over fewer, so gain and eps
must follow for the result to stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from prunekit.errors import ConfigError
from prunekit.graph.groups import Cut
from prunekit.graph.masks import Keep, to_keep
from prunekit.graph.skeleton import clone
from prunekit.graph.slicing import slice_tensors


def rescale_norms(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Scale the gains of every norm that averages over removed channels by s = sqrt(before / kept),
    and its eps by s**2, before cutting.

    A norm that adds one to its gain gets (1 + w) s - 1. Which of the two it is, is tried on the
    module itself. Raises ConfigError where neither makes the norm of the kept channels what it was
    with zeros.
    """
    keep = to_keep(model, [c.units for c in cuts])
    styles: dict[tuple[str, tuple[int, ...]], tuple[bool, str]] = {}
    for path in dict.fromkeys(path for c in cuts for path in c.candidate.norms):
        module = model.get_submodule(path)
        own = {n: axes for n, axes in keep.items() if n.rpartition(".")[0] == path}
        gain = next((n for n in own if len(tensor_shape(module, n)) == 1), None)
        if gain is None:
            raise ConfigError(
                f"norm=rescale: {path or 'the model'} averages over removed channels, but has no "
                "gain of its own to correct"
            )
        index = own[gain][0]
        leaf = gain.rpartition(".")[2]
        before = tensor_shape(module, gain)[0]
        key = (type(module).__qualname__, (before, len(index)))
        if key not in styles:
            styles[key] = style_of(
                module, leaf, {n.rpartition(".")[2]: axes for n, axes in own.items()}
            )
        offset, eps = styles[key]
        correct(module, leaf, eps, before / len(index), offset)


def tensor_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(getattr(module, name.rpartition(".")[2]).shape)


def correct(module: nn.Module, leaf: str, eps: str, growth: float, offset: bool) -> None:
    w = getattr(module, leaf)
    s = math.sqrt(growth)
    with torch.no_grad():
        w.copy_((w + 1) * s - 1 if offset else w * s)
    setattr(module, eps, getattr(module, eps) * growth)


def style_of(module: nn.Module, leaf: str, keep: Keep) -> tuple[bool, str]:
    """Whether the gain is `1 + w`, and the name of eps, by trying both on a copy of the norm with
    random gains.
    """
    index, draw = keep[leaf][0], torch.Generator().manual_seed(0)
    before = getattr(module, leaf).shape[0]
    zeroed = torch.randn(3, 5, before, generator=draw)
    gone = torch.ones(before, dtype=torch.bool)
    gone[index] = False
    zeroed[..., gone] = 0
    old = clone(module, lambda t: torch.rand(t.shape, generator=draw)).float()
    with torch.no_grad():
        target = old(zeroed)[..., index]
        for eps in [k for k, v in vars(module).items() if "eps" in k and isinstance(v, float)]:
            for offset in (False, True):
                new = clone(old, lambda t: t.detach().clone())
                correct(new, leaf, eps, before / len(index), offset)
                slice_tensors(new, keep)
                if torch.allclose(new(zeroed[..., index]), target, rtol=1e-4, atol=1e-5):
                    return offset, eps
    raise ConfigError(
        f"norm=rescale: {type(module).__name__} has no correction that makes removing equal "
        "zeroing; use norm=plain"
    )
