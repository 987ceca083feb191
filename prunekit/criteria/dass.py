"""DaSS (Guo et al., TMLR 2025, arXiv 2405.01943): in a gated FFN, weights of what makes an
intermediate channel compete for the channels, weights of what reads them as in Wanda.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from prunekit import graph
from prunekit.architecture.linear import makes, readers
from prunekit.architecture.matrices import matrix, module_name, to_out_in
from prunekit.registry import criteria
from prunekit.scoring.dass import maker_score
from prunekit.scoring.wanda import module_norms, wanda_score
from prunekit.types import Group, Run, Scores, tensor_of


class Maker(NamedTuple):
    """A matrix whose outputs are intermediate channels: row `rows[u]` makes what the module
    `reader` gets as its input `inputs[u]`, both `(units, width)`.
    """

    rows: Tensor
    reader: str
    inputs: Tensor


def ffn_matrices(model: nn.Module) -> tuple[dict[str, Maker], set[str]]:
    """What discovery finds of FFNs: modules that make intermediate channels, and those that read
    them. A module that makes anything else beside (a fused projection) is left out.
    """
    makers: dict[str, Maker] = {}
    reading: set[str] = set()
    for group in graph.discover(model, verify=False):
        found = readers(model, group) if group.kind == "neurons" else []
        if len(found) != 1:
            continue
        reading.add(found[0].name)
        for member in group.members:
            outputs = tensor_of(model, member.param).shape[member.axis]
            if makes(model, member) and member.index.numel() == outputs:
                module = member.param.removesuffix(".weight")
                makers[module] = Maker(member.index, found[0].name, found[0].member.index)
    return makers, reading


def competing_axes(model: nn.Module, groups: list[Group]) -> dict[str, int]:
    """Along which axis of (outputs, inputs) the elements of a matrix compete: 0 for what makes the
    channels, 1 for what reads them. Attention is not among them.
    """
    makers, reading = ffn_matrices(model)
    axes = {name: 0 for name in makers} | {name: 1 for name in reading}
    return {g.name: axes[module_name(g)] for g in groups if module_name(g) in axes}


@criteria.register(
    paper="arXiv 2405.01943", year=2025, needs="data", kinds=("weights",), axes=competing_axes
)
@torch.no_grad()
def dass(
    model: nn.Module, groups: list[Group], run: Run, *, alpha: Annotated[float, Field(ge=0)] = 0.5
) -> Scores:
    """FFN matrices only: what makes an intermediate channel by |w| * ||channel||^alpha, compared
    among the channels that one input feeds; what reads it as Wanda does.

    Which matrices these are is discovered. A channel that is weak loses more weights, up to all it
    has. N:M patterns of what makes the channels lie along the outputs: sparse tensor cores do not
    take them. Attention stays dense.
    """
    makers, _ = ffn_matrices(model)
    reading = {n: makers[n].reader if n in makers else n for n in map(module_name, groups)}
    norms = module_norms(model, dict.fromkeys(reading.values()), run)
    scores = {}
    for g in groups:
        name, W = module_name(g), matrix(model, g)
        if name in makers:
            score = maker_score(W, row_norms(makers[name], norms[reading[name]]), alpha)
        else:
            score = wanda_score(W, norms[name])
        scores[g.name] = to_out_in(model, g, score)
    return scores


def row_norms(maker: Maker, norms: Tensor) -> Tensor:
    """(outputs) the norm of the channel that each row makes, from the reader's `norms (inputs)`."""
    out = norms.new_zeros(maker.rows.numel())
    per_unit = norms[maker.inputs].square().sum(1).sqrt()
    out[maker.rows] = per_unit[:, None].expand(maker.rows.shape)
    return out
