"""Models whose weights lie in mapped files (`model.weights=disk`): every method does to them, bit
for bit, what it does in memory, and what takes a weight's place lies in a file too.
"""

from __future__ import annotations

import copy

import pytest
import torch
from problems import problem, uniform
from tiny_models import tiny_model

from prunekit import checkpoint
from prunekit.architecture.mapped import beside, is_mapped, mapped_copy, release
from prunekit.architecture.offload import map_weights
from prunekit.cli.compose import composed
from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer
from prunekit.registry import models, pruners
from prunekit.runner.results import widths
from prunekit.runner.run import run

TEXT = torch.randint(8, 100, (6, 16), generator=torch.Generator().manual_seed(0))
HALF = uniform(0.5, "prunable")
METHODS = {
    "wanda": ("unstructured", {"name": "wanda"}, HALF),
    "sparsegpt": ("sparsegpt", None, HALF),
    "alps": ("alps", None, HALF),
    "sparse_database": (
        "sparse_database",
        None,
        {
            "name": "random",
            "target": 0.5,
            "of": "prunable",
            "samples": 2,
            "tokens": 16,
            "window": 8,
        },
    ),
    "flap": ("layerwise", {"name": "flap"}, uniform(0.25)),
    "obs": ("obs", None, uniform(0.25)),
    "slicegpt": ("slicegpt", None, uniform(0.25)),
    "block_influence": ("oneshot", {"name": "block_influence"}, uniform(0.25)),
    "taylor": ("oneshot", {"name": "taylor"}, uniform(0.25)),
    "reap": ("layerwise", {"name": "experts"}, uniform(0.25)),
}
OPTIONS = {
    "flap": {"compensate": "bias"},
    "obs": {"ridge": 64, "target": "dense"},
    "block_influence": {"kinds": ["blocks"]},
    "reap": {"kinds": ["experts"]},
    "sparse_database": {"refit": False},
}


def prune(name, model):
    pruner, criterion, ratio = METHODS[name]
    node = {"name": pruner, **OPTIONS.get(name, {})}
    return pruners.build(node)(problem(model, TEXT, criterion=criterion, ratio=ratio))


def on_disk(folder):
    node = {"name": "hf", "path": str(folder), "weights": "disk", "device": "cpu"}
    return models.build(node)()[0]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def saved(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_the_same_to_weights_in_files(name, tmp_path):
    model = tiny_model("mixtral" if name == "reap" else "llama", 4)
    there = on_disk(saved(model, tmp_path / "dense"))
    assert all(is_mapped(p) for p in there.parameters())
    expected, found = prune(name, model), prune(name, there)
    assert equal(found.kept, expected.kept)
    assert equal(found.model.state_dict(), expected.model.state_dict())
    large = [p for p in found.model.parameters() if p.dim() > 1]
    assert large
    assert all(is_mapped(p) for p in large)
    weights = {g.name for g in found.groups if g.kind == "weights"}
    assert all(is_mapped(found.kept[n]) for n in weights & found.kept.keys())
    checkpoint.save(found.model, None, tmp_path / "pruned", kept=found.kept, groups=found.groups)
    again, _ = checkpoint.load(tmp_path / "pruned")
    assert equal(again.state_dict(), expected.model.state_dict())
    assert all(is_mapped(p) for p in large), "saving left the model as it was"


def test_tied_weights_share_a_file(tmp_path):
    model, _ = models.build({"name": "tiny_llama", "tie": True, "device": "cpu"})()
    there = on_disk(saved(model, tmp_path / "dense"))
    assert there.lm_head.weight is there.model.embed_tokens.weight
    checkpoint.save(there, None, tmp_path / "again", max_shard_size="100KB")
    assert equal(checkpoint.load(tmp_path / "again")[0].state_dict(), model.state_dict())


def test_a_written_tensor_keeps_its_value_when_its_pages_go():
    there = mapped_copy(torch.arange(5000.0))
    there[::2] = -1
    release([there])
    assert there[:4].tolist() == [-1, 1, -1, 3]
    assert not is_mapped(there.clone())
    assert is_mapped(beside(torch.ones(3), there[1:]))
    assert not is_mapped(beside(torch.ones(3), torch.ones(3)))


def test_a_forward_leaves_no_more_than_a_block_resident():
    model = tiny_model("llama", 6, hidden=256, ffn=1024, heads=4, kv=4)
    map_weights(model)
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(resident(model.parameters())))
    with torch.no_grad():
        model(TEXT)
    assert 0.5 * block < min(seen)
    assert max(seen) < 1.5 * block
    copied = copy.deepcopy(model)
    assert resident(copied.parameters()) == 0  # in memory of the process, not in files


def test_masks_are_not_resident_once_they_are_counted():
    model = tiny_model("llama", 2, hidden=256, ffn=1024, heads=4, kv=4)
    map_weights(model)
    pruned = prune("wanda", model)
    assert resident(pruned.kept.values()) == 0
    assert [2**17, 2**18] in widths(pruned).values()
    assert resident(pruned.kept.values()) == 0


def resident(tensors):
    """Bytes of those of them in files that are in this process's memory."""
    starts = {t.untyped_storage().data_ptr() for t in tensors if is_mapped(t)}
    total, ours = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                first, last = (int(x, 16) for x in head.split("-"))
                ours = any(first <= start < last for start in starts)
            elif ours and head == "Rss:":
                total += int(line.split()[1]) * 1024
    return total


def test_a_whole_run_gives_the_same_numbers(tmp_path):
    model, _ = models.build({"name": "tiny_llama", "layers": 2, "device": "cpu"})()
    words = [
        "model=hf",
        f"model.path={saved(model, tmp_path / 'model')}",
        "model.device=cpu",
        "pruner=unstructured",
        "criterion=wanda",
        "ratio.of=prunable",
        "calib.samples=4",
        "calib.length=32",
        "exclude=none",
        "eval=quick",
        "track=silent",
        "cache=off",
    ]
    found = {}
    for place in ("memory", "disk"):
        (cfg,) = composed([*words, f"model.weights={place}"])
        found[place] = run(cfg, tmp_path / place)
    assert found["memory"]["kept"] == found["disk"]["kept"]
    for key in ("dense/ppl_pydocs_32", "pruned/ppl_pydocs_32", "pruned/params"):
        assert found["memory"]["results"][key] == found["disk"]["results"][key]


def test_what_cannot_lie_in_files_is_refused(tmp_path):
    model = tiny_model("llama", 2)
    folder = saved(model, tmp_path / "dense")
    node = {"name": "hf", "path": str(folder), "weights": "disk"}
    with pytest.raises(ConfigError, match="device_map=null"):
        models.build(node | {"device_map": "auto"})()
    checkpoint.save(model, None, tmp_path / "ours")
    with pytest.raises(ConfigError, match="read whole"):
        on_disk(tmp_path / "ours")
