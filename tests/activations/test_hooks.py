"""Hooks come off whatever happens."""

from __future__ import annotations

import pytest
from reference import tiny_llama

from prunekit.activations.hooks import hook_activations


def test_hooks_come_off_after_an_error(tokens):
    model = tiny_llama()

    def burst(_x):
        raise RuntimeError("seen")

    with (
        pytest.raises(RuntimeError, match="seen"),
        hook_activations(model, outputs={"model.layers.1": burst}),
    ):
        model(tokens)
    assert not model.model.layers[1]._forward_hooks
