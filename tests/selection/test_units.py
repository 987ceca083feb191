"""Selection, counts and sizes: exact, stable, never emptying a group."""

from __future__ import annotations

import pytest
import torch
from reference import llama_groups, tiny_llama

from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError
from prunekit.ratios.uniform import rounded, uniform, units_removed
from prunekit.selection import units as select
from prunekit.types import Group


def test_lowest_is_exact_and_stable_with_ties():
    assert select.lowest(torch.tensor([1.0, 1.0, 1.0, 0.0]), 2).tolist() == [
        False,
        True,
        True,
        False,
    ]
    assert select.lowest(torch.zeros(5), 0).all()


def test_local_never_empties():
    kept = select.local({"a": torch.arange(4.0)}, {"a": 4})
    assert kept["a"].tolist() == [False, False, False, True]


def test_masks_are_nested_in_the_count():
    s = {"a": torch.rand(50, generator=torch.Generator().manual_seed(0))}
    small, large = select.local(s, {"a": 10}), select.local(s, {"a": 30})
    assert not (large["a"] & ~small["a"]).any()


def test_pooled_ranks_across_groups_and_spares_the_best_of_each():
    scores = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([1.0, 2.0, 3.0])}
    kept = select.pooled(scores, lambda c: sum(c.values()) <= 4)
    assert {n: int((~k).sum()) for n, k in kept.items()} == {"a": 2, "b": 2}
    assert kept["a"][2]
    assert kept["b"][2]


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ConfigError, match="neurons.1"):
        select.local({"neurons.1": torch.tensor([1.0, torch.nan])}, {"neurons.1": 1})


@pytest.mark.parametrize(
    ("units", "width", "share", "removed"),
    [
        (11008, 1, 0.25, 2752),  # LLaMA-7B, block 20 %
        (11008, 1, 0.60, 11008 - 4403),  # block 50 %
        (32, 128, 0.25, 8),
        (32, 128, 0.60, 19),
        (4096, 1, 0.20, 4096 - 3276),  # channel 20 %
        (4096, 1, 0.50, 2048),
        (8, 128, 0.25, 2),  # Llama-3-8B kv heads
        (4, 64, 0.25, 1),  # TinyLlama kv heads
        (3, 64, 0.328, 0),  # SmolLM2: 0.98 of a head is no head
        (3, 64, 0.334, 1),
        (1536, 1, 0.328, 1536 - 1032),
        (10, 1, 0.0, 0),
        (2, 1, 0.99, 1),  # never empties
    ],
)
def test_the_papers_floor_rules(units, width, share, removed):
    group = Group(
        "g", "heads" if width > 1 else "neurons", 0, units, (type("M", (), {"width": width})(),)
    )
    assert units_removed(group, share) == removed


@pytest.mark.parametrize("of", ["model", "prunable"])
@pytest.mark.parametrize("target", [0.0, 0.05, 0.2, 0.31])
def test_solved_ratio_hits_within_one_unit(of, target):
    model = tiny_llama()
    groups = llama_groups(model, ("neurons", "heads"))
    sizes = Sizes(model, groups)
    counts = uniform(model, groups, None, target=target, of=of)
    asked = target * (sizes.total if of == "model" else sizes.prunable())
    unit = sizes.removed({"neurons.0": 1})
    assert abs(sizes.removed(counts) - asked) <= unit
    assert all(counts[g.name] < g.units for g in groups)


def test_a_target_out_of_reach_says_what_can_be_reached():
    model = tiny_llama()
    with pytest.raises(ConfigError, match="hold at most"):
        uniform(model, llama_groups(model, ("neurons",)), None, target=0.9, of="model")


def test_multiple_rounds_kept_neurons():
    group = Group("g", "neurons", 0, 1536)
    assert (1536 - rounded(group, 504, 64)) % 64 == 0
    assert rounded(group, 0, 64) == 0


def test_sizes_count_what_slicing_would_leave():
    model = tiny_llama(tie_word_embeddings=True)
    groups = llama_groups(model)
    sizes = Sizes(model, groups)
    small = tiny_llama(
        tie_word_embeddings=True,
        intermediate_size=15,
        hidden_size=20,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    want = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    counts = {"neurons.0": 5, "neurons.1": 5, "heads.0": 1, "heads.1": 1, "hidden": 4}
    assert sizes.removed(counts) == want
