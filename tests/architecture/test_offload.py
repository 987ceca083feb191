"""Models that accelerate keeps partly elsewhere: the same scores and the same pruned model as if
all of it lay in memory.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from prunekit import graph, registry
from prunekit.activations.runs import ModelRun
from prunekit.architecture import offload
from prunekit.cli.compose import composed
from prunekit.criteria.taylor import taylor
from prunekit.errors import ConfigError
from prunekit.runner.run import run

ON_DISK = (
    "{model.embed_tokens:cpu,model.layers.0:cpu,model.layers.1:disk,model.norm:cpu,"
    "model.rotary_emb:cpu,lm_head:cpu}"
)


def tiny(**options):
    return registry.models.build({"name": "tiny_llama", "layers": 2, "device": "cpu"} | options)()


def scores(model):
    tokens = torch.randint(0, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    return taylor(model, groups_of(model), ModelRun(model, tokens))


def groups_of(model):
    return [g for g in graph.discover(model, verify=False) if g.kind in ("heads", "neurons")]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("tie", [False, True])
def test_gathered_weights_give_the_same_gradients(tie):
    from accelerate import cpu_offload

    (plain, _), (model, _) = tiny(tie=tie), tiny(tie=tie)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert offload.offloaded(model)
    ids = torch.ones(1, 5, dtype=torch.long)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    with pytest.raises(ConfigError, match="gradients need every weight in memory"):
        taylor(model, groups_of(plain), ModelRun(model, ids))
    offload.gather(model)
    assert same(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert not any("forward" in m.__dict__ or hasattr(m, "_hf_hook") for m in model.modules())
    assert same(scores(model), scores(plain))


def test_a_run_with_layers_on_disk_gives_the_same_numbers(tmp_path):
    model, tokenizer = tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = [
        "model=hf",
        f"model.path={tmp_path / 'model'}",
        "exclude=none",
        "eval=quick",
        "track=silent",
        "save=false",
        "cache=off",
    ]
    found = {}
    for name, place in (("plain", "model.device=cpu"), ("disk", f"model.device_map={ON_DISK}")):
        (cfg,) = composed([*words, place])
        found[name] = run(cfg, tmp_path / name)
    assert found["plain"]["kept"] == found["disk"]["kept"]
    for key in ("dense/ppl_pydocs_32", "pruned/ppl_pydocs_32", "pruned/params"):
        assert found["plain"]["results"][key] == found["disk"]["results"][key]


def test_hooks_of_a_spread_model_outlive_the_scoring():
    from accelerate import dispatch_model

    (plain, _), (model, _) = tiny(), tiny()
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    before = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    assert any(before.values())
    assert same(scores(model), scores(plain))
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules()} == before


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_measured(monkeypatch):
    from accelerate import cpu_offload

    model, _ = tiny()
    monkeypatch.setattr(offload.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000))
    offload.check_fits_in_memory(model)  # already in memory
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="give more devices"):
        offload.check_fits_in_memory(model)


def test_what_came_from_an_accelerator_goes_back_to_one(monkeypatch):
    from accelerate import cpu_offload

    spread = []
    monkeypatch.setattr(offload, "dispatch", spread.append)
    for place, times in (("cpu", 0), (0, 1)):
        model, _ = tiny()
        cpu_offload(model, execution_device=torch.device("cpu"))
        model.hf_device_map = {"model": place, "lm_head": "cpu"}
        with offload.in_memory(model):
            assert not offload.offloaded(model)
        assert len(spread) == times
    with offload.in_memory(model):  # nothing is away: nothing is done
        pass
    assert len(spread) == 1
