"""A sample of transformers' architectures: what discovery must find in each, and that removing it
equals zeroing it.

The whole list is measured by `python benchmarks/coverage.py`; this keeps one of each sort of
difficulty under test.
"""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn

from prunekit.graph import remove
from prunekit.graph.discovery import Discovery, discovery
from prunekit.graph.groups import Cut
from prunekit.graph.sample_run import logits_of
from prunekit.graph.verification import count_after, masked_logits

SIZES = {"hidden": 48, "heads": 6, "kv": 3}
OTHER = {"codegen": {"hidden": 64, "heads": 8, "kv": 4}}  # its heads come in fours
USUAL = "neurons heads hidden blocks"
SAMPLE = {
    "mistral": USUAL,
    "gemma2": USUAL,
    "falcon": USUAL,
    "gpt_bigcode": USUAL,
    "codegen": USUAL,
    "gptj": USUAL,
    "mpt": USUAL,
    "olmo": USUAL,
    "olmo2": USUAL,
    "phi": USUAL,
    "stablelm": USUAL,
    "rembert": USUAL,
    "xlnet": USUAL,
    "cpmant": USUAL,
    "minicpm3": USUAL + " inner",
    "mamba": "hidden blocks inner",
    "mamba2": "heads hidden blocks",
    "bamba": USUAL,
    "mixtral": USUAL + " experts",
    "gpt_oss": USUAL + " experts",
    "dbrx": USUAL + " experts",
    "llama4_text": USUAL + " experts",
    "deepseek_v3": USUAL + " experts inner",
    "phimoe": USUAL + " experts",
    "beam": USUAL + " experts",
    "longcat_flash": USUAL + " experts inner",
    "zaya": "neurons heads hidden experts",
    "inkling2_text": "neurons heads hidden experts",
}


def masks(found: Discovery, kind: str) -> dict[str, Tensor]:
    kept, draw = {}, torch.Generator().manual_seed(7)
    for i, g in enumerate(g for g in found.groups if g.kind == kind):
        lost = min(1 + i % 2 * (g.units // 4), g.units - found.least.get(g.name, 1))
        kept[g.name] = torch.ones(g.units, dtype=torch.bool)
        kept[g.name][torch.randperm(g.units, generator=draw)[:lost]] = False
    return kept


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits_of(model(**inputs))


LONG = {"zaya", "inkling2_text", "longcat_flash"}  # half a minute each


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in SAMPLE]
)
def test_kinds_of_an_architecture(name: str) -> None:
    sizes = OTHER.get(name, SIZES | {"head_dim": 12})
    check(tiny_model(name, ffn=60, **sizes), set(SAMPLE[name].split()))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_kinds_on_the_models_that_others_made(name: str, tiny_archs: ModuleType) -> None:
    model = tiny_archs.tiny_model(name, inter=60, **OTHER.get(name, SIZES))
    check(model, set(SAMPLE[name].split()))


def check(model: nn.Module, kinds: set[str]) -> None:
    """Discovery finds `kinds`, and removing units of each equals zeroing them."""
    model.config.use_cache = False
    draw = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(8, 100, (1, 16), generator=draw)}
    found = discovery(model)
    assert {g.kind for g in found.groups} == kinds
    for kind in kinds - {"blocks"}:
        kept = masks(found, kind)
        cuts = [
            Cut.everywhere(c, kept[c.group.name]) for c in found.candidates if c.group.name in kept
        ]
        reference = masked_logits(model, inputs, cuts, found.skip)
        removed = remove(copy.deepcopy(model), kept)
        assert (
            float((logits(removed, inputs) - reference).abs().max() / reference.abs().max()) < 1e-4
        )
        assert sum(p.numel() for p in removed.parameters()) == count_after(model, cuts)
