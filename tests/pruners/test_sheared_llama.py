"""Sheared LLaMA: exact shapes, the loss that the masked model had, stock checkpoints, domains."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from problems import check, problem, uniform
from tiny_models import tiny_model

from prunekit.errors import ConfigError
from prunekit.pruners import sheared_llama
from prunekit.registry import pruners

SHAPE = {"hidden": 48, "heads": 1, "neurons": 70, "blocks": 2}
FAST = {"steps": 3, "batch": 2, "micro_batch": 1, "warmup_steps": 0, "mask_lr": 0.1}


def prune(of, **options):
    return pruners.build({"name": "sheared_llama", **FAST, **options})(of)


@pytest.fixture
def llama():
    return tiny_model("llama", layers=3)


def test_ratio_zero_changes_nothing(llama, tokens):
    before = copy.deepcopy(llama.state_dict())
    out = prune(problem(llama, tokens, ratio=uniform(0.0)), kinds=["heads", "neurons"])
    assert out.kept == {}
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_the_shape_is_met_and_stock_transformers_loads_it(arch, tokens, tmp_path, masked):
    from transformers import AutoModelForCausalLM

    model = tiny_model(arch, layers=4)
    dense = copy.deepcopy(model.state_dict())
    out = prune(problem(model, tokens), shape=SHAPE, lr=1e-3)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers) == (48, 2)
    assert (config.intermediate_size, config.num_key_value_heads) == (70, 1)
    assert out.notes["counts"]["blocks"] == 2
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, masked["logits"], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, masked["logits"], rtol=1e-4, atol=1e-4)
    assert not torch.equal(model.model.embed_tokens.weight, dense["model.embed_tokens.weight"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_exact_constraint_expects_the_shape(llama, tokens):
    """All but what the last step still moves."""
    options = {"shape": SHAPE, "constraint": "exact", "warmup": 0.0, "mask_lr": 1e-3}
    missed = prune(problem(llama, tokens), **options).notes["missed"]
    assert max(map(abs, missed.values())) < 1e-3


def test_a_criterion_says_in_which_order_masks_begin(llama, tokens):
    """Trained at next to no rate the lowest go; with a penalty, which opens all, it is refused."""
    asked = problem(llama, tokens, criterion={"name": "l2"})
    still = {"shape": {"neurons": 48}, "lr": 1e-9, "mask_lr": 1e-9}
    with pytest.raises(ConfigError, match=r"give criterion=none, or pruner\.constraint=exact"):
        check("sheared_llama", asked, **still)
    scores = asked.score(asked.groups(["neurons"]), asked.run())
    out = prune(asked, constraint="exact", **still)
    for name, score in scores.items():
        assert torch.equal(out.kept[name].nonzero()[:, 0], score.argsort()[-48:].sort().values)


def test_blocks_may_all_stay(llama, tokens):
    out = prune(problem(llama, tokens), shape={"hidden": 48, "blocks": 3})
    assert llama.config.num_hidden_layers == 3
    assert llama.config.hidden_size == 48
    assert out.notes["counts"]["blocks"] == 0


def test_a_ratio_chooses_the_same_counts_everywhere(llama, tokens):
    ratio = uniform(0.3, "prunable", loadable="stock")
    out = prune(problem(llama, tokens, ratio=ratio), kinds=["heads", "neurons"])
    assert len({n for name, n in out.notes["counts"].items() if "neurons" in name}) == 1
    assert llama.model.layers[2].mlp.down_proj.in_features == llama.config.intermediate_size < 96


def test_masks_far_from_the_shape_are_told(llama, tokens, caplog):
    missed = prune(problem(llama, tokens), shape={"neurons": 48}).notes["missed"]
    assert missed["neurons"] < -0.4
    assert "of the neurons to go, and 50.0 % go" in caplog.text


def test_masks_close_as_their_constraints_say(llama, tokens):
    """Half of the neurons are to go: what masks expect moves there from none."""
    options = {"steps": 30, "warmup": 0.3, "lr": 1e-3, "mask_lr": 0.3}
    missed = prune(problem(llama, tokens), shape={"neurons": 48}, **options).notes["missed"]
    assert -0.4 < missed["neurons"] <= 0.5


def test_domains_have_losses_and_weights(llama, tokens):
    texts = {"calibration": tokens, "a": tokens[:2], "b": tokens[2:]}
    of = dataclasses.replace(problem(llama, tokens), token_sets=texts)
    with torch.no_grad():
        plain = float(llama(tokens[:1], labels=tokens[:1]).loss)
    out = prune(of, shape={"neurons": 70}, update_every=1)
    assert out.notes["domain_reference"]["a"] == pytest.approx(plain, rel=1e-4)
    assert list(out.notes["domain_weights"][0].values()) == [0.5, 0.5]
    assert len(out.notes["domain_weights"]) > 1
    with pytest.raises(ConfigError, match="lacks the loss of b"):
        prune(of, shape={"neurons": 60}, reference={"a": 1.0})
    with pytest.raises(ConfigError, match="a has one sample"):
        prune(dataclasses.replace(of, token_sets=texts | {"a": tokens[:1]}), shape={"neurons": 60})


def test_what_cannot_be_is_said_from_shapes(llama):
    with pytest.raises(ConfigError, match="possible: 1 to 96"):
        check("sheared_llama", problem(llama), shape={"neurons": 97})
    with pytest.raises(ConfigError, match="ratio=none"):
        check("sheared_llama", problem(llama, ratio=uniform(0.2)), shape=SHAPE)
    with pytest.raises(ConfigError, match="LayerNorm"):
        check("sheared_llama", problem(tiny_model("gpt2")), shape={"hidden": 48})
    with pytest.raises(ConfigError, match="builds no"):
        check("sheared_llama", problem(tiny_model("gpt2")), shape={"heads": 1})
    assert sheared_llama.held_out([1]) == 0
