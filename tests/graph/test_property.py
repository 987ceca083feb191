"""The property that defines a group: zeroing units and removing them give the same logits, on eight
architectures.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from prunekit.graph import discover, edits, rebuild, remove, zero
from prunekit.graph.discovery import discovery
from prunekit.graph.groups import Cut
from prunekit.graph.verification import masked_logits
from prunekit.types import Group, Kept, tensor_of

TOKENS = torch.randint(8, 100, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def random_kept(groups: list[Group], kind: str, seed: int) -> Kept:
    """Between one unit and half of them removed from each group of a kind, differently in each."""
    draw = torch.Generator().manual_seed(seed)
    kept = {}
    for g in groups:
        if g.kind == kind:
            lost = int(torch.randint(1, max(g.units // 2, 1) + 1, (), generator=draw))
            kept[g.name] = torch.ones(g.units, dtype=torch.bool)
            kept[g.name][torch.randperm(g.units, generator=draw)[:lost]] = False
    return kept


def parameters_lost(model: nn.Module, groups: list[Group], kept: Kept) -> int:
    """Counted element by element: what lies in at least one removed slice."""
    gone = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    for g in groups:
        for m in g.members if g.name in kept else ():
            if m.param in gone:
                gone[m.param].index_fill_(m.axis, m.index[~kept[g.name]].reshape(-1), True)
        for u in (~kept[g.name]).nonzero()[:, 0].tolist() if g.modules and g.name in kept else ():
            for n in gone:
                if n.startswith(g.modules[u] + "."):
                    gone[n].fill_(True)
    return int(sum(m.sum() for m in gone.values()))


def total(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["neurons", "heads", "blocks"])
@pytest.mark.parametrize("seed", [0, 1])
def test_zeroing_equals_removing(architecture: nn.Module, kind: str, seed: int) -> None:
    groups = discover(architecture)
    kept = random_kept(groups, kind, seed)
    assert len(kept) == (1 if kind == "blocks" else 3)
    zeroed, removed = (
        zero(copy.deepcopy(architecture), kept),
        remove(copy.deepcopy(architecture), kept),
    )
    assert off(logits(zeroed), logits(architecture)) > 1e-2
    assert off(logits(removed), logits(zeroed)) < 1e-5
    assert total(removed) == total(architecture) - parameters_lost(architecture, groups, kept)


def has_layer_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.LayerNorm) for m in model.modules())


def test_residual_channels(architecture: nn.Module) -> None:
    """RMSNorm: rescaled removal equals plain zeroing. LayerNorm: removal equals zeroing with
    statistics over the kept channels.
    """
    found = discovery(architecture)
    kept = random_kept(found.groups, "hidden", 0)
    hidden = next(c for c in found.candidates if c.group.kind == "hidden")
    removed = remove(copy.deepcopy(architecture), kept, norm="plain")
    cut = Cut.everywhere(hidden, kept["hidden"])
    reference = masked_logits(architecture, {"input_ids": TOKENS}, [cut], frozenset())
    assert off(logits(removed), reference) < 1e-5
    assert off(reference, logits(architecture)) > 1e-2
    assert total(removed) == total(architecture) - parameters_lost(architecture, found.groups, kept)
    if not has_layer_norm(architecture):
        zeroed, rescaled = (
            zero(copy.deepcopy(architecture), kept),
            remove(copy.deepcopy(architecture), kept, norm="rescale"),
        )
        assert off(logits(rescaled), logits(zeroed)) < 1e-5
        assert off(logits(removed), logits(zeroed)) > 1e-3


def test_everything_at_once_then_generate_and_rebuild(architecture: nn.Module) -> None:
    """All kinds in one call, uneven widths: ties hold, the cache agrees, and edits and shapes are
    enough to build the model again.
    """
    groups = discover(architecture)
    kept = {
        n: k
        for kind in ("neurons", "heads", "hidden", "blocks")
        for n, k in random_kept(groups, kind, 3).items()
    }
    removed = remove(copy.deepcopy(architecture), kept)
    tied = architecture.get_input_embeddings().weight is architecture.get_output_embeddings().weight
    assert (removed.get_input_embeddings().weight is removed.get_output_embeddings().weight) == tied
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, uncached = (removed.generate(TOKENS, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, uncached)
    state = {**dict(removed.named_parameters()), **dict(removed.named_buffers())}
    again = rebuild(
        copy.deepcopy(architecture), {n: list(t.shape) for n, t in state.items()}, edits(removed)
    )
    with torch.no_grad():
        for name, t in state.items():
            tensor_of(again, name).copy_(t)
    assert torch.equal(logits(again), logits(removed))


def test_removing_twice_equals_removing_once(llama: nn.Module) -> None:
    first, second = torch.arange(88) >= 20, torch.arange(88) >= 30
    step = remove(copy.deepcopy(llama), {"neurons.1": first})
    remove(step, {"neurons.1": second[first]})
    assert torch.equal(logits(step), logits(remove(copy.deepcopy(llama), {"neurons.1": second})))
