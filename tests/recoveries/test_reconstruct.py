"""Blocks are brought to what the dense model's put out, and nothing but what was to be trained
moves.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from problems import half_of_the_weights
from tiny_models import tiny_model

from prunekit import graph
from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer
from prunekit.problem import Problem
from prunekit.recoveries.reconstruct import check_reconstruct, reconstruct
from prunekit.registry import recoveries
from prunekit.training.reconstruction import relative_error
from prunekit.types import Pruned

SHORT = {"dataset": "text", "samples": 8, "length": 32, "steps": 30, "lr": 1e-2, "batch": 4}


def half_of_the_neurons(model) -> Pruned:
    groups = [g for g in graph.discover(model, verify=False) if g.kind == "neurons"]
    kept = {g.name: torch.arange(g.units) % 2 == 0 for g in groups}
    graph.remove(model, kept)
    return Pruned(model, kept, groups)


def run(out, dense, text, **over):
    asked = Problem(out.model, byte_tokenizer(), load_dense=lambda: dense)
    reconstruct(asked, out, **{**SHORT, "path": text, **over})
    return out.notes["reconstruction"]


@pytest.mark.parametrize("updates", ["mask", "scale", None])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_blocks_come_closer_and_zeros_stay(arch, updates, text):
    dense = tiny_model(arch, vocab_size=259)
    out = half_of_the_weights(copy.deepcopy(dense))
    before = copy.deepcopy(out.model.state_dict())
    errors = run(out, dense, text, updates=updates)
    assert len(errors) == 2
    for first, last in errors.values():
        assert last < first
    after = out.model.state_dict()
    assert list(after) == list(before)
    matrices = {g.matrix for g in out.groups}
    for name, weight in after.items():
        if name in matrices:
            assert torch.equal(weight, before[name]) == (updates is None)
        elif name.endswith("bias") or ("norm" not in name and "ln_" not in name):
            assert torch.equal(weight, before[name])
    for g in out.groups:
        assert not after[g.matrix][~out.kept[g.name]].any()
    assert all(p.requires_grad for p in out.model.parameters())


def test_the_errors_are_those_of_the_blocks(text):
    """The first block's inputs are the same in both models; the second one's are its own."""
    dense = tiny_model("llama", vocab_size=259)
    out = half_of_the_neurons(copy.deepcopy(dense))
    start = copy.deepcopy(out.model)
    errors = run(out, dense, text)
    ids = torch.tensor(byte_tokenizer()(Path(text).read_text()).input_ids[: 8 * 32]).view(8, 32)
    for model, which in ((start, 0), (out.model, 1)):
        with torch.no_grad():
            theirs, mine = (
                m.model(ids, output_hidden_states=True).hidden_states[1] for m in (dense, model)
            )
        wrong = float((mine - theirs).square().sum() / theirs.square().sum())
        assert errors["model.layers.0"][which] == pytest.approx(wrong, rel=1e-3)


def test_what_comes_no_closer_stays(text):
    dense = tiny_model("llama", vocab_size=259)
    out = half_of_the_neurons(copy.deepcopy(dense))
    before = copy.deepcopy(out.model.state_dict())
    errors = run(out, dense, text, lr=1.0, steps=2)
    for first, last in errors.values():
        assert first == last
    assert all(torch.equal(w, before[n]) for n, w in out.model.state_dict().items())


def test_the_relative_error_counts_all_batches():
    targets = [torch.ones(2, 3), torch.full((1, 3), 2.0)]
    off = [torch.zeros(2, 3), torch.full((1, 3), 3.0)]
    assert relative_error(lambda i: off[i], targets) == pytest.approx((6 + 3) / (6 + 12))


def test_a_bfloat16_model_comes_back_in_bfloat16(text):
    dense = tiny_model("llama", vocab_size=259).bfloat16()
    out = half_of_the_weights(copy.deepcopy(dense))
    errors = run(out, dense, text)
    assert all(last < first for first, last in errors.values())
    assert {p.dtype for p in out.model.parameters()} == {torch.bfloat16}


def test_what_cannot_be_is_said(text):
    model = tiny_model("llama", meta=True)
    defaults = recoveries.entry("reconstruct").defaults
    with pytest.raises(ConfigError, match="not of one length"):
        check_reconstruct(model, **{**defaults, "dataset": "alpaca"})
    with pytest.raises(ConfigError, match="nothing to train"):
        check_reconstruct(model, **{**defaults, "norms": False, "updates": None})
    dense = tiny_model("llama", layers=3, vocab_size=259)
    other = Pruned(tiny_model("llama", layers=2, vocab_size=259), {}, [])
    with pytest.raises(ConfigError, match="there are 2, and the dense model has 3"):
        run(other, dense, text)
    with pytest.raises(ConfigError, match=r"samples=900: the text has \d+ of 32 tokens"):
        run(other, dense, text, samples=900)


def test_a_dense_model_that_accelerate_keeps_elsewhere_teaches_from_there(text):
    from accelerate import cpu_offload

    dense = tiny_model("llama", vocab_size=259)
    errors = []
    for teacher in (copy.deepcopy(dense), dense):
        if teacher is dense:
            cpu_offload(teacher, execution_device=torch.device("cpu"))
            assert all(p.is_meta for p in teacher.parameters())
        out = half_of_the_weights(tiny_model("llama", vocab_size=259))
        errors.append(run(out, teacher, text, steps=3))
    assert errors[0] == errors[1]
