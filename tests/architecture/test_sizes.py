"""Parameter counts from shapes."""

from __future__ import annotations

from reference import llama_groups, tiny_llama

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
