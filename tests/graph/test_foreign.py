"""Modules that are not transformers' are discovered and pruned like any other: the same property,
kind by kind.
"""

from __future__ import annotations

import copy

import pytest
import torch
from foreign import FOREIGN, VOCAB
from torch import Tensor, nn

from prunekit.graph import discover, edits, rebuild, remove, report, zero
from prunekit.graph.discovery import discovery
from prunekit.graph.groups import Cut
from prunekit.graph.sample_run import logits_of
from prunekit.graph.small_model import randomised
from prunekit.graph.verification import masked_logits
from prunekit.types import Kept

TOKENS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(2))
KINDS = ("neurons", "heads", "hidden", "blocks")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(FOREIGN[name]().eval())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return logits_of(model(TOKENS))


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def some_kept(model: nn.Module, kind: str, seed: int = 0) -> Kept:
    draw, kept = torch.Generator().manual_seed(seed), {}
    for i, g in enumerate(g for g in discover(model) if g.kind == kind):
        kept[g.name] = torch.ones(g.units, dtype=torch.bool)
        kept[g.name][torch.randperm(g.units, generator=draw)[: 1 + i % 2 * (g.units // 4)]] = False
    return kept


@pytest.mark.parametrize("name", FOREIGN)
def test_every_kind_is_found_in_every_block(name: str) -> None:
    model = build(name)
    found = {g.name for g in discover(model)}
    ffn = (
        [f"neurons.{i}.e{k}" for i in range(3) for k in range(5)]
        if name == "mixtral"
        else [f"neurons.{i}" for i in range(3)]
    )
    experts = [f"experts.{i}" for i in range(3)] if name == "mixtral" else []
    assert found == {"hidden", "blocks", *(f"heads.{i}" for i in range(3)), *ffn, *experts}
    assert report(model) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FOREIGN)
def test_removing_equals_zeroing(name: str, kind: str) -> None:
    model = build(name)
    kept = some_kept(model, kind)
    removed = logits(remove(copy.deepcopy(model), kept))
    if kind == "hidden":
        hidden = next(c for c in discovery(model).candidates if c.group.kind == "hidden")
        cut = Cut.everywhere(hidden, kept["hidden"])
        inputs = {"idx" if name == "nanogpt" else "input_ids": TOKENS}
        reference = masked_logits(model, inputs, [cut], discovery(model).skip)
    else:
        reference = logits(zero(copy.deepcopy(model), kept))
    assert off(reference, logits(model)) > 1e-2
    assert off(removed, reference) < 1e-5


def test_an_expert_goes_with_its_router_row() -> None:
    """Zeroed experts still draw probability; removed ones leave the router's softmax
    to the others.
    """
    model = build("mixtral")
    kept = {"experts.1": torch.tensor([True, False, True, True, True])}
    removed = remove(copy.deepcopy(model), kept)
    layer, dense = removed.layers[1], model.layers[1]
    assert (layer.num_experts, layer.gate.out_features, len(layer.experts)) == (4, 4, 4)
    assert torch.equal(layer.gate.weight, dense.gate.weight[[0, 2, 3, 4]])
    assert torch.equal(layer.experts[1].w1.weight, dense.experts[2].w1.weight)
    candidate = next(c for c in discovery(model).candidates if c.group.name == "experts.1")
    cut = Cut.everywhere(candidate, kept["experts.1"])
    assert (
        off(
            logits(removed),
            masked_logits(model, {"input_ids": TOKENS}, [cut], frozenset()),
        )
        < 1e-5
    )


def test_alibi_follows_its_heads_through_a_rebuild() -> None:
    """The slopes are made outside the blocks: what enters a pruned block is sliced, also after the
    edits were applied to a new model.
    """
    model = build("bloom")
    removed = remove(copy.deepcopy(model), some_kept(model, "heads"))
    shapes = {n: list(p.shape) for n, p in removed.named_parameters()}
    again = rebuild(copy.deepcopy(model), shapes, edits(removed))
    again.load_state_dict(removed.state_dict())
    assert torch.equal(logits(again), logits(removed))
