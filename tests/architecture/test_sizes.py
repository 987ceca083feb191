"""Parameter counts from shapes."""

from __future__ import annotations

from blocks import blocks
from foreign import ListedMixtral
from reference import llama_groups, tiny_llama

from prunekit import graph
from prunekit.architecture.sizes import Sizes


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


def test_whole_modules_count_at_their_mean_size():
    model = tiny_llama(num_hidden_layers=4)
    inside = sum(p.numel() for p in model.model.layers.parameters())
    sizes = Sizes(model, [blocks(model)])
    assert [sizes.removed({"blocks": n}) for n in (0, 1, 4)] == [0, inside // 4, inside]
    listed = ListedMixtral()
    experts = [g for g in graph.discover(listed) if g.kind == "experts"]
    layer = listed.layers[0]
    each = layer.gate.weight.shape[1] + sum(p.numel() for p in layer.experts[0].parameters())
    assert Sizes(listed, experts).removed({"experts.0": 2}) == 2 * each
