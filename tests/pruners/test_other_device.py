"""Pruning on a device that is not the CPU, over two devices as `device_map=auto` spreads a model,
and on one to which blocks come in turn: the same choice, no tensors of two devices in one
operation, few waits.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from other_device import DEVICE, other_device
from problems import problem, uniform
from tiny_models import tiny_model
from torch import nn

from prunekit import graph
from prunekit.activations.gram import GramStatistics
from prunekit.activations.runs import ModelRun
from prunekit.architecture import streaming
from prunekit.architecture.matrices import matrices
from prunekit.architecture.offload import put_beside
from prunekit.cli.compose import composed
from prunekit.graph.skeleton import skeleton
from prunekit.models import hf
from prunekit.pruners.copal import _Accumulated
from prunekit.registry import models, pruners
from prunekit.runner.determinism import repeatable
from prunekit.runner.run import run
from prunekit.selection.elements import by_alpha, per_row
from prunekit.solvers.besa import staying
from prunekit.solvers.obs import greedy_removal
from prunekit.solvers.sparsegpt import inverse_factor, lowest_of_block, solve_columns

TEXT = torch.randint(8, 100, (6, 16), generator=torch.Generator().manual_seed(0))
HALF = uniform(0.5, "prunable")
BLOCKS = {"name": "oneshot", "kinds": ["blocks"]}
WHOLE = {"name": "unstructured", "schedule": "whole"}
METHODS = {
    "taylor": ({"name": "oneshot"}, {"name": "taylor"}, uniform(0.25)),
    "channel": ({"name": "oneshot", "kinds": ["hidden"]}, {"name": "l2"}, uniform(0.25)),
    "flap": ({"name": "layerwise", "compensate": "bias"}, {"name": "flap"}, uniform(0.25)),
    "wanda": ({"name": "unstructured"}, {"name": "wanda"}, HALF),
    "pooled": (WHOLE, {"name": "wanda"}, HALF | {"ranking": "global"}),
    "sparsegpt": ({"name": "sparsegpt"}, None, HALF),
    "admm": ({"name": "admm"}, None, HALF),
    "obs": (
        {"name": "obs", "precision": "model", "ridge": 64, "target": "dense"},
        None,
        uniform(0.25),
    ),
    "database": (
        {"name": "database", "precision": "model", "ridge": 64, "levels": 4, "refit": False},
        None,
        {"name": "milp", "target": 0.3, "of": "prunable"},
    ),
    "sparse_database": (
        {"name": "sparse_database", "refit": False},
        None,
        {"name": "milp", "target": 0.5, "of": "prunable"},
    ),
    "slicegpt": ({"name": "slicegpt"}, None, uniform(0.25)),
    "laco": ({"name": "laco", "merge": 2}, None, uniform(0.25)),
    "llm_surgeon": ({"name": "llm_surgeon", "shots": 2, "cost": "group"}, None, uniform(0.25)),
    "llm_surgeon_matrices": ({"name": "llm_surgeon_matrices", "shots": 2}, None, HALF),
    "adainfer": ({"name": "adainfer", "threshold": -0.2}, None, None),
    "angular": (BLOCKS, {"name": "angular"}, uniform(0.25)),
    "block_influence": (BLOCKS, {"name": "block_influence"}, uniform(0.25)),
    "block_magnitude": (BLOCKS, {"name": "block_magnitude"}, uniform(0.25)),
    "block_ppl": (BLOCKS, {"name": "block_ppl"}, uniform(0.25)),
    "block_taylor": (BLOCKS, {"name": "block_taylor"}, uniform(0.25)),
}


def prune(name, model):
    pruner, criterion, ratio = METHODS[name]
    asked = problem(model, TEXT, criterion=criterion, ratio=ratio)
    return pruners.build(pruner)(asked)


def check_alike(model, found, there, expected):
    """The same units and logits, but for rounding: attention takes another path there."""
    assert found.kept.keys() == expected.kept.keys()
    assert all(kept.device.type == "cpu" for kept in found.kept.values())
    for name, kept in expected.kept.items():
        assert (found.kept[name].cpu() == kept).float().mean() > 0.998, name
    with torch.no_grad():
        logits = there(TEXT.to(next(there.parameters()).device)).logits.cpu()
        expected_logits = model(TEXT).logits
    assert (logits - expected_logits).norm() < 0.01 * expected_logits.norm()


def small_model() -> nn.Module:
    return tiny_model("llama", 4, hidden=32, ffn=48)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_is_chosen_on_another_device(name):
    model = small_model()
    there = copy.deepcopy(model)
    expected = prune(name, model)
    with other_device():
        check_alike(model, prune(name, there.to(DEVICE)), there, expected)


def spread(model: nn.Module) -> nn.Module:
    """The last two of four blocks on `DEVICE`, the rest on the CPU, with accelerate's hooks."""
    blocks = [f"model.layers.{i}" for i in range(4)]
    for name in ("model.embed_tokens", *blocks, "model.norm", "lm_head"):
        device = DEVICE if name in blocks[2:] else torch.device("cpu")
        module = model.get_submodule(name).to(device)
        add_hook_to_module(module, AlignDevicesHook(execution_device=device))
    return model


@pytest.mark.parametrize("name", METHODS)
def test_the_same_is_chosen_over_two_devices(name):
    model = small_model()
    there = copy.deepcopy(model)
    expected = prune(name, model)
    with other_device():
        check_alike(model, prune(name, spread(there)), there, expected)


def put(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """What a parameter holds cannot become a tensor of another class; the two change places."""
    torch.utils.swap_tensors(parameter, nn.Parameter(data, parameter.requires_grad))


@pytest.mark.parametrize("name", [n for n in METHODS if not n.startswith("llm_surgeon")])
def test_the_same_is_chosen_where_blocks_come_to_the_device_in_turn(name, monkeypatch):
    monkeypatch.setattr(streaming, "put", put)
    model = small_model()
    there = copy.deepcopy(model)
    expected = prune(name, model)
    with other_device():
        streaming.stream(there, DEVICE)
        found = prune(name, there)
        assert {p.device.type for p in there.parameters()} == {"cpu"}
        with torch.no_grad():
            assert there(TEXT).logits.device == DEVICE
        check_alike(model, found, there, expected)


def test_a_whole_run_gives_the_same_numbers_where_blocks_come_in_turn(monkeypatch, tmp_path):
    model, tokenizer = models.build({"name": "tiny_llama", "layers": 2, "device": "cpu"})()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    words = ["model=hf", f"model.path={tmp_path / 'model'}", "exclude=none", "eval=quick"]
    words += ["calib.samples=4", "calib.length=16", "track=silent", "cache=off", "recovery=none"]
    words += ["criterion=taylor", "ratio.target=0.25"]
    found = {}
    for weights in ("memory", "host", "disk"):
        (cfg,) = composed([*words, f"model.weights={weights}"])
        if weights != "memory":
            monkeypatch.setattr(streaming, "put", put)
            monkeypatch.setattr(hf, "default_device", lambda: DEVICE.type)
        with other_device() if weights != "memory" else nullcontext():
            found[weights] = run(cfg, tmp_path / weights)
    for record in (found["host"], found["disk"]):
        assert record["kept"] == found["memory"]["kept"]
        for when in ("dense", "pruned"):
            key = f"{when}/ppl_pydocs_32"
            assert record["results"][key] == pytest.approx(found["memory"]["results"][key])


def test_buffers_of_a_model_on_a_device_are_in_its_skeleton():
    model = tiny_model("llama")
    expected = model.model.rotary_emb.inv_freq.clone()
    with other_device():
        small, _ = skeleton(model.to(DEVICE))
        assert torch.equal(small.model.rotary_emb.inv_freq, expected)


@pytest.mark.parametrize("width", [1, 3])
def test_one_wait_for_all_units_that_structured_obs_removes(width):
    x = torch.randn(90, 24, generator=torch.Generator().manual_seed(0))
    H, W = x.T @ x, torch.randn(7, 24)
    units = torch.arange(24).view(-1, width)
    waits = []
    for count in (2, 7):
        with other_device() as seen:
            order, costs = greedy_removal(W.to(DEVICE), H.inverse().to(DEVICE), units, count)
        waits.append(sum(seen.values()))
        assert (order, costs) == greedy_removal(W, H.inverse(), units, count)
    assert waits[0] == waits[1] <= 3


def test_sums_over_batches_wait_for_nothing():
    with other_device() as waits:
        stats = GramStatistics(8, 3, DEVICE)
        for x in torch.randn(5, 4, 8).to(DEVICE):
            stats.add(x, x[:, :3], x[:, 0].square())
        assert not waits
        assert float(stats.total) > 0
        assert sum(waits.values()) == 1


def test_one_wait_for_all_columns_of_sparsegpt():
    x, W = torch.randn(90, 24), torch.randn(7, 24).to(torch.float64)
    upper, _ = inverse_factor(x.T @ x, 0.01, "w")
    with other_device() as waits:
        rule = lowest_of_block(84, 24, 4)
        new, kept, _ = solve_columns(W.to(DEVICE), upper.to(DEVICE), rule, 4)
        assert sum(waits.values()) == 1
        expected, mask, _ = solve_columns(W, upper, rule, 4)
        assert torch.equal(kept.cpu(), mask)
        torch.testing.assert_close(new.cpu(), expected)


def test_copal_s_scores_of_all_matrices_wait_in_host_memory():
    model = tiny_model("llama", 1)
    groups = [g for g in matrices(model) if "q_proj" in g.name or "down_proj" in g.name]
    expected = _Accumulated()(groups, ModelRun(model, TEXT))
    with other_device():
        total = _Accumulated()
        found = total(groups, ModelRun(model.to(DEVICE), TEXT))
        assert {s.device.type for s in total.total.values()} == {"cpu"}
        assert {s.device for s in found.values()} == {DEVICE}
        for name, scores in expected.items():
            torch.testing.assert_close(found[name].cpu(), scores)


def test_masks_of_zeros_wait_in_host_memory():
    model = tiny_model("llama", 1)
    groups = [g for g in graph.discover(model, verify=False) if g.kind == "neurons"]
    kept = {g.name: torch.arange(g.units) % 2 == 0 for g in groups}
    graph.zero(model, kept)
    expected = graph.zero_masks(model, groups, kept)
    with other_device():
        masks = graph.zero_masks(model.to(DEVICE), groups, kept)
        assert {m.device.type for m in masks.values()} == {"cpu"}
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())


def test_a_model_over_several_devices_stays_there_beside_another():
    with other_device():
        model, whole, over_two = (small_model() for _ in range(3))
        spread(over_two).hf_device_map = {"model.layers.2": DEVICE.type, "lm_head": "cpu"}
        there = model.to(DEVICE)
        assert {p.device for p in put_beside(whole, there).parameters()} == {DEVICE}
        before = [p.device for p in over_two.parameters()]
        assert [p.device for p in put_beside(over_two, there).parameters()] == before


def test_elements_are_chosen_alike_where_a_gpu_must_repeat_itself():
    scores = torch.rand(5, 12, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    theta = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    chosen = (
        lambda x: per_row(x, 23),
        lambda x: by_alpha(x, 23),
        lambda x: staying(theta.to(x.device), 12),
    )
    expected = [choose(scores) for choose in chosen]
    with other_device(), repeatable({"deterministic": True}):
        for choose, here in zip(chosen, expected, strict=True):
            assert torch.equal(choose(scores.to(DEVICE)).cpu(), here)
        with pytest.raises(RuntimeError, match="kthvalue CUDA does not have"):
            scores.to(DEVICE).kthvalue(2)


def test_the_device_of_these_tests_refuses_what_a_gpu_refuses():
    with other_device() as waits:
        x = torch.ones(3).to(DEVICE)
        for mixes in (lambda: x + torch.ones(3), lambda: torch.stack([x[0], torch.ones(())])):
            with pytest.raises(RuntimeError, match="and on the CPU"):
                mixes()
        with pytest.raises(RuntimeError, match="indices on lazy"):
            torch.ones(3)[x.long()]
        assert (x + torch.tensor(1.0)).device == DEVICE
        assert not waits
        assert float(x.sum()) == 3
        assert sum(waits.values()) == 1
