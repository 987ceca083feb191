"""NaN and infinity end the job at the stage where they appear, and say where."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from compositions import config

from prunekit import registry
from prunekit.errors import NotFinite
from prunekit.registry import Component, Entry
from prunekit.runner import numerics
from prunekit.runner.run import run


@pytest.fixture
def tiny():
    return registry.models.build({"name": "tiny_llama", "layers": 2})()[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(tiny, value):
    numerics.check_weights(tiny, "load")
    with torch.no_grad():
        tiny.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(NotFinite, match=r"load: model.layers.1.mlp.up_proj.weight holds 1 of 8192"):
        numerics.check_weights(tiny, "load")


def test_the_layer_that_overflows_is_found(tiny, tokens):
    assert "finite" in numerics.origin(tiny, tokens)
    with torch.no_grad():
        for linear in (tiny.model.layers[0].mlp.up_proj, tiny.model.layers[0].mlp.down_proj):
            linear.weight.mul_(1e30)
    with pytest.raises(NotFinite, match=r"pruned/ppl: ppl is inf: .*model.layers.0.mlp.down_proj"):
        numerics.check_numbers("pruned/ppl", {"a": 1.0, "ppl": float("inf")}, tiny)
    numerics.check_numbers("pruned/ppl", {"a": 1.0}, tiny)


def test_scores_are_numbers(tiny, tokens):
    from prunekit.activations.runs import ModelRun

    def broken(model, groups, run):
        return {"neurons.0": torch.ones(3), "neurons.1": torch.tensor([1.0, float("nan")])}

    criterion = numerics.watched(Component(Entry("broken", broken, {}, {}, {}), {}))
    with pytest.raises(NotFinite, match=r"score: the scores of neurons\.1"):
        criterion(tiny, [], ModelRun(tiny, tokens))
    assert numerics.watched(None) is None


def broken_model(monkeypatch):
    build = registry.models.build

    def made(node):
        real = build(node)

        def ask(meta=False, **_):
            model, tokenizer = real(meta=meta)
            if not meta:
                with torch.no_grad():
                    model.model.layers[2].mlp.gate_proj.weight[0, 0] = float("nan")
            return model, tokenizer

        return replace(real, entry=replace(real.entry, fn=ask))

    monkeypatch.setattr(registry.models, "build", made)


def test_a_job_fails_unless_it_is_allowed(tmp_path, monkeypatch):
    broken_model(monkeypatch)
    with pytest.raises(NotFinite, match=r"load: model\.layers\.2\.mlp\.gate_proj\.weight"):
        run(config(), tmp_path / "a")
    assert not (tmp_path / "a" / "result.json").exists()
    run(config("allow_nonfinite=true", "criterion=random", "save=false"), tmp_path / "b")
    record = json.loads((tmp_path / "b" / "result.json").read_text())
    assert "dense/ppl_pydocs_32" in record["not_finite"]
