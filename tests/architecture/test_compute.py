"""Half-precision weights that run in float32 (`model.compute=float32`): the numbers of a float32
model, and the weights stay what they were.
"""

from __future__ import annotations

import copy

import pytest
import torch
from problems import problem, uniform
from tiny_models import tiny_model

from prunekit import checkpoint
from prunekit.architecture.compute import compute_in_float32, computes_in_float32
from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer
from prunekit.registry import models, pruners
from prunekit.runner.cache import model_print

TEXT = torch.randint(8, 100, (6, 16), generator=torch.Generator().manual_seed(0))
METHODS = {
    "wanda": ({"name": "unstructured"}, {"name": "wanda"}, uniform(0.5, "prunable")),
    "slicegpt": ({"name": "slicegpt"}, None, uniform(0.25)),
    "taylor": ({"name": "oneshot"}, {"name": "taylor"}, uniform(0.25)),
    "shortgpt": (
        {"name": "oneshot", "kinds": ["blocks"]},
        {"name": "block_influence"},
        uniform(0.25),
    ),
}


def half_and_whole(arch="llama", **options):
    """The same numbers twice: bfloat16 that runs in float32, and float32."""
    half = tiny_model(arch, 4, **options).to(torch.bfloat16)
    whole = copy.deepcopy(half).float()
    compute_in_float32(half)
    return half, whole


@pytest.mark.parametrize("arch", ["llama", "mixtral", "gpt2", "mamba"])
def test_the_outputs_are_those_of_float32(arch):
    """Mamba's but for the final states, which its own code rounds to the head's dtype."""
    half, whole = half_and_whole(arch)
    with torch.no_grad():
        found, expected = (m(input_ids=TEXT).logits for m in (half, whole))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 if arch == "mamba" else 0)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_chooses_what_it_would_in_float32(name, tmp_path):
    pruner, criterion, ratio = METHODS[name]
    half, whole = half_and_whole()
    found, expected = (
        pruners.build(pruner)(problem(m, TEXT, criterion=criterion, ratio=ratio))
        for m in (half, whole)
    )
    assert found.kept.keys() == expected.kept.keys()
    for group, mask in expected.kept.items():
        assert torch.equal(found.kept[group], mask)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    assert computes_in_float32(found.model)
    checkpoint.save(found.model, None, tmp_path / "pruned", kept=found.kept, groups=found.groups)
    again, _ = checkpoint.load(tmp_path / "pruned")
    for key, value in found.model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_gradients_reach_the_weights():
    half, whole = half_and_whole()
    for model in (half, whole):
        model(input_ids=TEXT, labels=TEXT).loss.backward()
    theirs = dict(whole.named_parameters())
    for name, p in half.named_parameters():
        assert torch.equal(p.grad, theirs[name].grad.to(torch.bfloat16))


def test_the_cache_tells_it_from_half_precision():
    half = tiny_model("llama", 2).to(torch.bfloat16)
    before = model_print(half)
    compute_in_float32(half)
    assert model_print(half) != before


def test_a_forward_that_fails_leaves_the_weights_as_they_were():
    half, _ = half_and_whole()
    before = dict(half.named_parameters())

    def fail(module, args, out):
        raise RuntimeError("stop")

    half.model.layers[1].self_attn.o_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad():
        half(input_ids=TEXT)
    after = dict(half.named_parameters())
    assert all(after[name] is p for name, p in before.items())


def test_what_runs_in_float32_already_is_refused(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama", 2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    node = {"name": "hf", "path": str(folder), "compute": "float32"}
    with pytest.raises(ConfigError, match="no weight"):
        models.build(node)()
    with pytest.raises(ConfigError, match="device_map=null"):
        models.build(node | {"device_map": "auto"})()
    model, _ = models.build(node | {"dtype": "bfloat16", "device": "cpu"})()
    assert computes_in_float32(model)
