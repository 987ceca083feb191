"""Models that come to a device block by block (`model.weights=host`, `disk` with an accelerator):
every method does to them, bit for bit, what it does to one that is there.

Here the device is the CPU, and copies of the blocks take part in place of blocks moved there.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from problems import problem, uniform
from tiny_models import tiny_model
from torch import nn

from prunekit import checkpoint
from prunekit.activations.hooks import raise_stop, stop_early
from prunekit.architecture import prefetch, streaming
from prunekit.architecture.compute import compute_in_float32
from prunekit.architecture.mapped import RESTS, is_mapped
from prunekit.architecture.offload import map_weights
from prunekit.architecture.streaming import outside_blocks, stream, turn
from prunekit.cli.compose import composed
from prunekit.errors import ConfigError
from prunekit.models import hf
from prunekit.registry import models, pruners
from prunekit.runner import again, preflight

TEXT = torch.randint(8, 100, (6, 16), generator=torch.Generator().manual_seed(0))
QUARTER, HALF = uniform(0.25), uniform(0.5, "prunable")
METHODS = {
    "wanda": ({"name": "unstructured"}, {"name": "wanda"}, HALF),
    "sparsegpt": ({"name": "sparsegpt"}, None, HALF),
    "admm": ({"name": "admm"}, None, HALF),
    "obs": ({"name": "obs", "ridge": 64, "target": "dense"}, None, QUARTER),
    "flap": ({"name": "layerwise", "compensate": "bias"}, {"name": "flap"}, QUARTER),
    "shortgpt": ({"name": "oneshot", "kinds": ["blocks"]}, {"name": "block_influence"}, QUARTER),
    "slicegpt": ({"name": "slicegpt"}, None, QUARTER),
    "taylor": ({"name": "oneshot"}, {"name": "taylor", "by_block": True}, QUARTER),
    "reap": ({"name": "layerwise", "kinds": ["experts"]}, {"name": "experts"}, QUARTER),
}
LACKS = {
    ("gpt2", "slicegpt"): "its norms subtract a mean",
    ("gpt2", "reap"): "it has no experts",
    ("llama", "reap"): "it has no experts",
    ("mixtral", "flap"): "its neurons are of experts, in no single linear module",
    ("mixtral", "obs"): "likewise",
    ("mixtral", "slicegpt"): "its experts are stacked",
}
CASES = [
    (arch, name, weights)
    for arch in ("llama", "gpt2", "mixtral")
    for name in METHODS
    if (arch, name) not in LACKS
    for weights in (("host", "disk") if arch == "llama" or name == "reap" else ("host",))
]


def prune(name, model):
    pruner, criterion, ratio = METHODS[name]
    return pruners.build(pruner)(problem(model, TEXT, criterion=criterion, ratio=ratio))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def streamed(model, weights="host"):
    """A copy of the model whose blocks come in turn, from files where `weights` is `disk`."""
    there = copy.deepcopy(model)
    if weights == "disk":
        map_weights(there)
    stream(there, "cpu")
    return there


def at_rest(model):
    """Whether nothing of a model is at work."""
    how = streaming.streaming(model)
    return not (how.visits or how.inside or any(hasattr(p, RESTS) for p in model.parameters()))


@pytest.mark.parametrize(("arch", "name", "weights"), CASES)
def test_a_method_does_the_same_to_blocks_that_come_in_turn(arch, name, weights, tmp_path):
    model = tiny_model(arch, 4)
    there = streamed(model, weights)
    expected, found = prune(name, model), prune(name, there)
    assert equal(found.kept, expected.kept)
    assert equal(found.model.state_dict(), expected.model.state_dict())
    assert at_rest(there)
    if weights == "disk":
        masks = [found.kept[g.name] for g in found.groups if g.kind == "weights"]
        assert all(is_mapped(t) for t in [*masks, *(p for p in there.parameters() if p.dim() > 1)])
    if arch == "llama":
        checkpoint.save(there, None, tmp_path / "pruned", kept=found.kept, groups=found.groups)
        again, _ = checkpoint.load(tmp_path / "pruned")
        assert equal(again.state_dict(), expected.model.state_dict())


def sizes_at_work(model, inside):
    """Numbers of parameters that are at work, seen whenever a module of the kind `inside` runs."""
    how, seen = streaming.streaming(model), []
    for module in model.modules():
        if type(module).__name__ == inside:
            module.register_forward_hook(lambda *_: seen.append(sum(p.numel() for p in how.visits)))
    return seen


def test_one_block_at_a_time_is_at_work():
    model = streamed(tiny_model("llama", 4))
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    seen = sizes_at_work(model, "LlamaMLP")
    with torch.no_grad():
        model(TEXT)
    assert seen == [block] * 4
    prune("sparsegpt", model)
    assert max(seen) == block < 0.3 * sum(p.numel() for p in model.parameters())


def test_a_forward_that_is_cut_short_leaves_nothing_at_work():
    model = streamed(tiny_model("llama", 4))
    model.model.layers[1].mlp.register_forward_hook(lambda *_: raise_stop())
    with torch.no_grad(), stop_early():
        model(TEXT)
    assert at_rest(model)


def test_what_is_written_to_in_a_turn_or_a_forward_goes_back():
    model = streamed(tiny_model("llama", 2))
    block, norm = model.model.layers[0], model.model.norm.weight
    wide = block.mlp.up_proj.weight
    rests = wide.data_ptr()
    with turn(block), torch.no_grad():
        assert wide.data_ptr() != rests
        wide.data[0] = 7  # as many methods write it
        block.mlp.gate_proj.weight = nn.Parameter(torch.ones(3, 4))
        block.mlp.down_proj.bias = nn.Parameter(torch.ones(5))
    assert wide.data_ptr() == rests
    assert wide[0].eq(7).all()
    assert block.mlp.gate_proj.weight.shape == (3, 4)
    assert at_rest(model)
    expected = 2 * norm
    model.model.norm.register_forward_pre_hook(lambda module, _: module.weight.mul_(2))
    with torch.no_grad():
        model.model.norm(torch.ones(1, 1, len(norm)))
    assert torch.equal(norm, expected)


def test_what_a_turn_puts_in_a_weights_place_goes_into_a_file_where_that_was_in_one():
    model = streamed(tiny_model("llama", 2), "disk")
    block = model.model.layers[0]
    with turn(block):
        block.mlp.up_proj.weight = nn.Parameter(torch.ones(3, 4))
    assert is_mapped(block.mlp.up_proj.weight)
    assert torch.equal(block.mlp.up_proj.weight, torch.ones(3, 4))


def test_turns_may_lie_inside_each_other_and_weights_may_be_tied():
    model, _ = models.build({"name": "tiny_llama", "tie": True, "device": "cpu"})()
    expected = model(TEXT).logits.detach()
    stream(model, "cpu")
    ends = outside_blocks(model)
    with turn(*ends), torch.no_grad():
        with turn(model.model.layers[0]):
            assert torch.equal(model(TEXT).logits, expected)
        assert hasattr(model.lm_head.weight, RESTS)
        assert not hasattr(model.model.layers[0].mlp.up_proj.weight, RESTS)
    assert at_rest(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_block_in_whose_stead_something_else_computes_stays_where_it_rests():
    model = streamed(tiny_model("llama", 2))
    block = model.model.layers[1]
    seen = []

    def instead(x, *_, **__):
        seen.append(hasattr(block.mlp.up_proj.weight, RESTS))
        return x

    with torch.no_grad():
        block.forward = streaming.without_weights(instead)
        model(TEXT)
        with turn(block):
            model(TEXT)
            assert hasattr(block.mlp.up_proj.weight, RESTS)
    assert seen == [False, True]
    assert at_rest(model)


def test_half_precision_is_converted_where_it_computes():
    model = tiny_model("llama", 2).to(torch.bfloat16)
    there = streamed(model)
    for each in (model, there):
        compute_in_float32(each)
    with torch.no_grad():
        assert torch.equal(there(TEXT).logits, model(TEXT).logits)
    assert at_rest(there)


def test_a_copy_is_an_ordinary_model():
    model = tiny_model("llama", 2)
    copied = copy.deepcopy(streamed(model))
    assert streaming.streaming(copied) is None
    copied(TEXT).logits.sum().backward()


def test_gradients_of_the_whole_are_refused():
    model = streamed(tiny_model("llama", 2))
    with pytest.raises(ConfigError, match="a backward needs the whole model on it"):
        model(TEXT)
    whole = {"name": "taylor", "by_block": False}
    asked = problem(model, TEXT, criterion=whole, ratio=QUARTER)
    with pytest.raises(ConfigError, match="a backward needs the whole model on it"):
        pruners.build({"name": "oneshot"})(asked)
    assert at_rest(model)


STREAMED = ("model=hf", "model.path=/nowhere", "model.weights=host", "eval=none", "track=silent")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("pruner=llm_surgeon", "criterion=none"), "pruner=llm_surgeon"),
        (("criterion=taylor", "criterion.by_block=false"), "criterion=taylor"),
        (("criterion=l2", "recovery=lora_text"), "recovery=lora"),
    ],
)
def test_what_needs_the_whole_model_on_the_device_is_refused_first(words, named):
    (cfg,) = composed([*STREAMED, "ratio=uniform", "ratio.target=0.2", *words])
    with pytest.raises(ConfigError, match=f"{named}.* needs the whole model on it"):
        preflight.check(cfg)


def test_where_weights_cannot_rest_is_refused(tmp_path, monkeypatch):
    node = {"name": "hf", "path": str(tmp_path), "weights": "host"}
    with pytest.raises(ConfigError, match="the device is the CPU"):
        models.build(node | {"device": "cpu"})()
    monkeypatch.setattr(hf, "default_device", lambda: "cpu")
    with pytest.raises(ConfigError, match="the device is the CPU"):
        models.build(node)()
    with pytest.raises(ConfigError, match="device_map=null"):
        models.build(node | {"device_map": "auto"})()


def test_a_checkpoint_is_measured_so_but_not_recovered(monkeypatch):
    node = {"name": "hf", "path": "/nowhere", "weights": "host"}
    monkeypatch.setattr(again, "made_of", lambda _: {"model": node})
    assert again.dense_model(Path("/nowhere")).options["weights"] == "host"
    assert again.dense_model(Path("/nowhere"), "cpu").options["weights"] == "memory"
    (cfg,) = composed([*STREAMED, "recovery=lora_text"])
    with pytest.raises(ConfigError, match="recovery=lora needs the whole model on it"):
        again.check_again(cfg, Path("/nowhere"), recover=True)


def test_memory_that_cannot_be_pinned_is_ordinary_and_that_is_said_once(monkeypatch, caplog):
    def refuse(_):
        raise RuntimeError("no room")

    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    weights = [torch.ones(3), torch.ones(4)]
    assert all(streaming._pinned(w) is w for w in weights)
    assert [r.message for r in caplog.records] == [
        "some weights stay in ordinary memory, which a GPU reads slowly: no room"
    ]


class Side:
    """In the place of a stream of CUDA: what is sent to it is done at once."""

    def synchronize(self):
        pass


@pytest.fixture
def ahead(monkeypatch):
    """What copies ahead, to the CPU; what it copied, in order."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Side())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Side())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.no_grad())
    return prefetch.Ahead(torch.device("cpu"))


def test_what_ran_next_the_last_time_is_copied_ahead(ahead):
    model = tiny_model("llama", 4)
    with torch.no_grad():
        expected = model(TEXT).logits
    stream(model, "cpu")
    streaming.streaming(model).ahead = ahead
    taken = []
    take = ahead.take
    ahead.take = lambda m, wanted: taken.append(take(m, wanted)) or taken[-1]
    parts = 4 + 3  # blocks, and embedding, norm, head
    for known in ([False] * parts, [False] + [True] * (parts - 1), [True] * parts):
        taken.clear()
        with torch.no_grad():
            assert torch.equal(model(TEXT).logits, expected)
        assert [all(t is not None for t in copies) for copies in taken] == known
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)  # what was copied of it is not it any more
        changed = model(TEXT).logits
    assert not torch.equal(changed, expected)
    with turn(model.model.layers[2]):
        assert not ahead.copies
