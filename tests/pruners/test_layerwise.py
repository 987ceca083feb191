"""The layer-wise schedule against the same steps by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import problem, uniform
from tiny_models import tiny_model

from prunekit import graph
from prunekit.activations.runs import ModelRun
from prunekit.errors import ConfigError
from prunekit.registry import criteria, pruners
from prunekit.selection.units import keep_local


@pytest.fixture
def llama():
    return tiny_model("llama", layers=3)


def prune(model, tokens, target=0.4, criterion="wanda_sp", exclude=None, of="units", **options):
    pruner = pruners.build({"name": "layerwise", **options})
    ratio = uniform(target, of)
    return pruner(
        problem(model, tokens, criterion={"name": criterion}, ratio=ratio, exclude=exclude)
    )


def test_each_block_is_scored_behind_the_pruned_ones(llama, tokens):
    by_hand = copy.deepcopy(llama)
    out = prune(llama, tokens)
    groups = [g for g in graph.discover(by_hand, verify=False) if g.kind in ("heads", "neurons")]
    for layer in range(3):
        # Whole-model passes see the same inputs, since the blocks before are zeroed already.
        row = [g for g in groups if g.layer == layer]
        scores = criteria.build({"name": "wanda_sp"})(by_hand, row, ModelRun(by_hand, tokens))
        kept = keep_local(scores, out.notes["counts"])
        for g in row:
            assert torch.equal(kept[g.name], out.kept[g.name]), g.name
        graph.zero(by_hand, kept)
    with torch.no_grad():
        torch.testing.assert_close(
            llama(tokens).logits, by_hand(tokens).logits, rtol=1e-4, atol=1e-4
        )


def test_counts_are_the_ratio_s(llama, tokens):
    out = prune(llama, tokens)
    assert out.notes["counts"] == {g.name: int((~out.kept[g.name]).sum()) for g in out.groups}
    assert llama.model.layers[1].mlp.down_proj.in_features == int(out.kept["neurons.1"].sum())


def test_ratio_zero_changes_nothing(llama, tokens):
    before = copy.deepcopy(llama.state_dict())
    prune(llama, tokens, target=0.0)
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())


def test_zeroing_keeps_the_shapes(llama, tokens):
    twin = copy.deepcopy(llama)
    prune(llama, tokens, remove=False)
    prune(twin, tokens)
    assert llama.model.layers[0].mlp.down_proj.weight.shape[1] == 96
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, twin(tokens).logits, rtol=1e-4, atol=1e-4)


def test_the_bias_brings_the_output_nearer(llama, tokens):
    with torch.no_grad():
        dense = llama(tokens).logits
    twin = copy.deepcopy(llama)
    prune(llama, tokens, kinds=["neurons"])
    prune(twin, tokens, kinds=["neurons"], compensate="bias")
    with torch.no_grad():
        assert (twin(tokens).logits - dense).norm() < (llama(tokens).logits - dense).norm()


def test_excluded_blocks_stay(llama, tokens):
    out = prune(llama, tokens, exclude=lambda groups: [g for g in groups if g.layer == 1])
    assert set(out.kept) == {"heads.1", "neurons.1"}


def test_a_criterion_that_needs_the_loss_is_refused(llama, tokens):
    with pytest.raises(ConfigError, match="needs the loss"):
        prune(llama, tokens, criterion="taylor")


@pytest.mark.slow
def test_the_real_model(smollm2, shared):
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    text = (shared / "data" / "wikitext2_tokenised" / "validation.txt").read_text()
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)[: 8 * 128].view(
        8, 128
    )
    total = sum(p.numel() for p in model.parameters())
    out = prune(model, tokens, target=0.1, of="model", compensate="bias", store="bfloat16")
    assert sum(
        p.numel() for n, p in model.named_parameters() if not n.endswith("bias")
    ) == pytest.approx(0.9 * total, rel=1e-4)
    with torch.no_grad():
        assert torch.isfinite(out.model(tokens).logits).all()
