"""Layers that draft further tokens are not read, and a pruned checkpoint does not claim them."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from prunekit import graph
from prunekit.checkpoint import save
from prunekit.checkpoint.draft_layers import without_draft_layers


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_a_pruned_mixture_has_no_draft_layers(name, tmp_path, tokens):
    model = tiny_model(name)
    model.config.num_mtp_layers = 1
    keep = torch.arange(5) != 2
    graph.remove(model, {"experts.1": keep})
    save(model, None, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content.get("num_nextn_predict_layers", content.get("num_mtp_layers")) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.num_mtp_layers == 0
    assert again.config.n_routed_experts == 4
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_model_with_such_weights_keeps_its_number(tmp_path):
    model = tiny_model("deepseek_v3")
    model.config.num_mtp_layers = 1
    (tmp_path / "config.json").write_text('{"num_nextn_predict_layers": 1}')
    model.register_parameter("mtp", torch.nn.Parameter(torch.zeros(1)))
    without_draft_layers(tmp_path / "config.json", model)
    assert json.loads((tmp_path / "config.json").read_text()) == {"num_nextn_predict_layers": 1}
