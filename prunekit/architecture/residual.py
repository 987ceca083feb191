"""The residual stream as a chain: embedding, then in each block sub-layers of norm, readers and
writers, then the last norm.

It is read off the group `hidden`, whose members stand in the order of the forward pass; no names of
an architecture are used.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prunekit.architecture.blocks import innermost_around
from prunekit.architecture.linear import is_linear
from prunekit.errors import ConfigError
from prunekit.types import Group, Member, tensor_of


@dataclass(frozen=True)
class Sublayer:
    """`x + module(norm(x))`: `readers` are the linear modules inside that take the norm's output,
    `writers` those that end in the sum.
    """

    module: str
    norm: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]


@dataclass(frozen=True)
class Stream:
    """Names of the embedding, of each block's sub-layers, and of the norm before the
    output matrix.
    """

    embedding: str
    blocks: tuple[str, ...]
    sublayers: tuple[tuple[Sublayer, ...], ...]
    norm: str


def stream(model: nn.Module, hidden: Group, blocks: tuple[str, ...]) -> Stream:
    """Raises ConfigError, naming the place, for a model whose blocks are no chain of norm,
    sub-layer and sum.
    """
    names = list(dict.fromkeys(m.param.rpartition(".")[0] for m in hidden.members))
    inside = [[n for n in names if n.startswith(b + ".")] for b in blocks]
    outside = [n for n in names if not any(n.startswith(b + ".") for b in blocks)]
    embeddings = [n for n in outside if isinstance(model.get_submodule(n), nn.Embedding)]
    norms = [n for n in outside if model.get_submodule(n)._parameters["weight"].dim() == 1]  # type: ignore[union-attr]
    if len(embeddings) != 1 or len(norms) != 1:
        raise ConfigError(
            f"the stream must start in one embedding and end in one norm, found {embeddings} and "
            f"{norms}"
        )
    weights = {m.param.rpartition(".")[0]: m for m in hidden.members if m.param.endswith("weight")}
    return Stream(
        embeddings[0],
        blocks,
        tuple(_sublayers(model, b, part, weights) for b, part in zip(blocks, inside, strict=True)),
        norms[0],
    )


def _sublayers(
    model: nn.Module, block: str, names: list[str], weights: dict[str, Member]
) -> tuple[Sublayer, ...]:
    sides = [_side(model, n, weights[n]) for n in names]
    found, at = [], 0
    while at < len(names):
        counts: list[int] = []
        for side in ("norm", "reads", "writes"):
            rest = sides[at + sum(counts) :]
            counts.append(len(list(takewhile(partial(operator.eq, side), rest))))
        if counts[0] != 1 or 0 in counts:
            raise ConfigError(
                f"{block} is no chain of norm, sub-layer and sum: on the residual stream stand "
                f"{', '.join(names)}"
            )
        norm, *linear = names[at : at + sum(counts)]
        module = innermost_around(linear)
        if not module.startswith(block + ".") or module in linear:
            raise ConfigError(f"{block}: {', '.join(linear)} are not inside one sub-layer")
        readers, writers = linear[: counts[1]], linear[counts[1] :]
        found.append(Sublayer(module, norm, tuple(readers), tuple(writers)))
        at += sum(counts)
    return tuple(found)


def _side(model: nn.Module, name: str, member: Member) -> str:
    module = model.get_submodule(name)
    if tensor_of(model, member.param).dim() == 1:
        return "norm"
    if not is_linear(module):
        raise ConfigError(f"{name} is {type(module).__name__}, not a linear module")
    return "reads" if (member.axis == 1) == isinstance(module, nn.Linear) else "writes"


class RmsNorm(NamedTuple):
    """What an RMSNorm computes with.

    Attributes:
        gain: (C,), `offset` and its weight.
        offset: 0 or 1.
        eps_name: the module's attribute that holds `eps`.
    """

    gain: Tensor
    offset: float
    eps_name: str
    eps: float


@torch.no_grad()
def gain_and_eps(norm: nn.Module) -> RmsNorm:
    """Found by trying the norm. Raises ConfigError for one that is not `x * gain / sqrt(mean(x^2) +
    eps)`.
    """
    weight: Tensor = norm.weight  # type: ignore[assignment]
    names = [k for k, v in vars(norm).items() if "eps" in k and isinstance(v, float)]
    signs = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).sign()
    x = (signs * torch.tensor([[1.0], [2.0], [0.5], [4.0]])).to(weight.device)
    for name in names:
        eps = getattr(norm, name)
        seen = norm(x.to(weight.dtype)).float().to(x.device) / (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        )
        for offset in (0.0, 1.0):
            if torch.allclose(
                seen, (weight.float() + offset).expand_as(seen), rtol=2e-2, atol=1e-3
            ):
                return RmsNorm(weight.float() + offset, offset, name, eps)
    raise ConfigError(
        f"{type(norm).__name__} is no RMSNorm: its statistics would not survive a rotation of the "
        "residual stream"
    )
