"""Gates in the weights: with soft gates folded and closed units cut out, the model computes what
the masked one did.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from prunekit import graph
from prunekit.errors import ConfigError
from prunekit.graph.fold_gates import block_parts, fold

KINDS = ("heads", "neurons", "hidden", "experts", "blocks")


def gates(groups):
    """A quarter of the units of each group closed, but of experts; the others anywhere."""
    draw, z = torch.Generator().manual_seed(0), {}
    for g in groups:
        z[g.name] = torch.rand(g.units, generator=draw) * 0.8 + 0.2
        if g.kind != "experts":
            z[g.name][torch.randperm(g.units, generator=draw)[: g.units // 4]] = 0
    return z


@pytest.mark.parametrize("arch", ["llama", "gemma2", "olmo2", "mixtral", "gpt2"])
@torch.no_grad()
def test_the_smaller_model_is_the_masked_one(arch, tokens):
    model = tiny_model(arch, layers=4)
    groups = [g for g in graph.discover(model) if g.kind in KINDS]
    groups = [g for g in groups if arch != "gpt2" or g.kind != "hidden"]
    z = gates(groups)
    blocks = next(g for g in groups if g.kind == "blocks")
    parts = block_parts(model, blocks)
    whole = [g for g in groups if g is not blocks] + parts
    soft = {n: v for n, v in z.items() if n != blocks.name}
    soft |= {p.name: v[None] for p, v in zip(parts, z[blocks.name], strict=True)}
    dense = model(tokens).logits
    with graph.gated(model, whole, soft):
        masked = model(tokens).logits
    fold(model, whole, soft)
    graph.remove(model, {n: v > 0 for n, v in z.items()}, norm="rescale")
    assert len(model.get_submodule(blocks.modules[0].rpartition(".")[0])) == 3
    torch.testing.assert_close(model(tokens).logits, masked, rtol=1e-4, atol=1e-4)
    assert (masked - dense).abs().max() > 0.1


def test_soft_gates_of_channels_need_rmsnorm(tokens):
    model = tiny_model("gpt2")
    hidden = [g for g in graph.discover(model) if g.kind == "hidden"]
    with pytest.raises(ConfigError, match="LayerNorm.*leave out kind hidden"):
        fold(model, hidden, {"hidden": torch.full((hidden[0].units,), 0.5)})


def test_whole_blocks_are_refused():
    model = tiny_model("llama")
    blocks = [g for g in graph.discover(model) if g.kind == "blocks"]
    with pytest.raises(ConfigError, match="kind blocks cannot be folded"):
        fold(model, blocks, {blocks[0].name: torch.full((2,), 0.5)})
