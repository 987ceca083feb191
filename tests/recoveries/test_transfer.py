"""Three arms of fine-tuning after small weights were set to zero."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import problem
from tiny_models import tiny_model

from prunekit import graph
from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer
from prunekit.problem import Problem
from prunekit.recoveries.transfer import transfer
from prunekit.registry import criteria, pruners, ratios
from prunekit.types import Pruned

SIZES = {"hidden": 32, "ffn": 48, "head_dim": 8, "vocab_size": 259}
QUARTER = {"name": "uniform", "target": 0.25, "of": "model"}
SHORT = {"dataset": "text", "max_length": 32, "batch": 4, "max_steps": 3, "lr": 3e-3}


def sparse(share: float) -> tuple[torch.nn.Module, Pruned]:
    """The dense model, and a copy without the smallest share of its weights."""
    model = tiny_model("llama", **SIZES)
    dense = copy.deepcopy(model)
    node = {"name": "uniform", "target": share, "of": "prunable", "ranking": "global"}
    given = problem(
        model,
        torch.randint(8, 100, (2, 8)),
        criterion=criteria.build({"name": "weight_magnitude"}),
        ratio=ratios.build(node),
    )
    return dense, pruners.build({"name": "unstructured", "schedule": "whole"})(given)


def after(arm: str, share: float, path: str, progress=None, **more):
    dense, pruned = sparse(share)
    masks = graph.zero_masks(pruned.model, pruned.groups, pruned.kept)
    given = Problem(
        pruned.model,
        byte_tokenizer(),
        load_dense=lambda: copy.deepcopy(dense),
        training=progress,
    )
    model = transfer(given, pruned, arm=arm, path=path, **SHORT | more)
    return dense, masks, model, pruned


def test_zeros_stay_zero_in_the_sparse_arm(text):
    _, masks, model, pruned = after("sparse", 0.5, text)
    assert masks
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask].all()
    assert not all(mask.all() for mask in pruned.kept.values())
    assert pruned.notes["recovery_examples"] > 8


def test_small_weights_are_the_dense_ones_to_the_bit_in_the_frozen_arm(text):
    dense, masks, model, pruned = after("frozen", 0.5, text)
    for name, mask in masks.items():
        weight, there = model.get_parameter(name), dense.get_parameter(name)
        assert torch.equal(weight[~mask], there[~mask])
        assert (weight[mask] != there[mask]).any()
    assert all(mask.all() for mask in pruned.kept.values())


def test_zeros_are_trained_in_the_dense_arm(text):
    dense, masks, model, pruned = after("dense", 0.5, text)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert weight[~mask].count_nonzero() > 0.9 * (~mask).sum()
        assert not torch.equal(weight[~mask], dense.get_parameter(name)[~mask])
    assert all(mask.all() for mask in pruned.kept.values())


def test_where_nothing_is_removed_the_arms_are_one(text):
    states = [after(arm, 0.0, text)[2].state_dict() for arm in ("sparse", "frozen", "dense")]
    for other in states[1:]:
        assert all(torch.equal(states[0][name], other[name]) for name in other)


def test_less_text_is_another_model(text):
    all_of_it = after("sparse", 0.0, text)[2].state_dict()
    _, _, model, pruned = after("sparse", 0.0, text, examples=4)
    assert pruned.notes["recovery_examples"] == 4
    assert not all(torch.equal(all_of_it[n], t) for n, t in model.state_dict().items())


def test_units_that_were_cut_out_leave_no_zeros_to_keep(text):
    model = tiny_model("llama", **SIZES)
    groups = [g for g in graph.discover(model, verify=False) if g.kind == "neurons"]
    kept = {g.name: torch.arange(g.units) % 2 == 0 for g in groups}
    graph.remove(model, kept)
    with pytest.raises(ConfigError, match="units were cut out"):
        transfer(Problem(model, byte_tokenizer()), Pruned(model, kept, groups), path=text, **SHORT)


def test_a_rotated_model_has_no_zeros_to_keep(text):
    model = tiny_model("llama", **SIZES)
    given = problem(model, torch.randint(8, 100, (4, 16)), ratio=ratios.build(QUARTER))
    pruned = pruners.build({"name": "slicegpt"})(given)
    with pytest.raises(ConfigError, match="or matrices replaced"):
        transfer(Problem(pruned.model, byte_tokenizer()), pruned, path=text, **SHORT)


def test_what_was_put_in_another_order_is_not_given_its_dense_values(text):
    dense, pruned = sparse(0.5)
    mlp, order = pruned.model.model.layers[0].mlp, torch.arange(SIZES["ffn"]).flip(0)
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    for name in ("gate_proj", "up_proj"):
        pruned.kept[f"weights.0.mlp.{name}"] = pruned.kept[f"weights.0.mlp.{name}"][order]
    pruned.kept["weights.0.mlp.down_proj"] = pruned.kept["weights.0.mlp.down_proj"][:, order]
    given = Problem(pruned.model, byte_tokenizer(), load_dense=lambda: dense)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.\w+\.weight does not stand where"):
        transfer(given, pruned, arm="frozen", path=text, **SHORT)


@pytest.mark.parametrize("arm", ["sparse", "frozen"])
def test_a_training_that_was_cut_off_goes_on(arm, text):
    class Progress:
        kept, left = None, 2

        def read(self):
            return self.kept

        def write(self, tensors):
            self.kept = {name: t.clone() for name, t in tensors.items()}
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    whole = after(arm, 0.5, text)[2].state_dict()
    progress = Progress()
    with pytest.raises(KeyboardInterrupt):
        after(arm, 0.5, text, save_every=1, progress=progress)
    resumed = after(arm, 0.5, text, save_every=1, progress=progress)[2].state_dict()
    assert progress.left == 0  # of three steps the last is not kept
    assert all(torch.equal(w, resumed[name]) for name, w in whole.items())
