"""Layers that take no low-rank updates are named before anything is loaded."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model

from prunekit.architecture.blocks import linear_names
from prunekit.errors import ConfigError
from prunekit.registry import recoveries
from prunekit.training.low_rank import check_updates


@pytest.mark.parametrize("name", ["lora", "distill"])
def test_layers_that_take_no_updates_are_named(name):
    model = tiny_model("mamba", meta=True)
    built = recoveries.build({"name": name, "dataset": "pydocs", "r": 4})
    with pytest.raises(ConfigError, match=r"on out_proj of MambaForCausalLM.*of .*in_proj"):
        built.meta["check"](model, **built.options)
    built.meta["check"](model, **built.options | {"targets": ["in_proj"]})


def test_layers_of_other_models_take_them():
    for arch in ("llama", "gpt2", "mixtral"):
        model = tiny_model(arch, meta=True)
        check_updates(model, linear_names(model, None))
