"""Hard-concrete gates: the authors' own numbers, closed forms, expected sizes exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from paths import GOLDEN
from tiny_models import tiny_model

from prunekit import graph
from prunekit.training.hard_concrete import (
    ExpectedSize,
    deterministic,
    lagrangian,
    open_probability,
    ramp,
    sample,
    slope,
    soft,
)

NAMES = ("layer", "head", "intermediate", "hidden")


@pytest.fixture(scope="module")
def sheared():
    with np.load(GOLDEN / "sheared_llama.npz") as file:
        return {k: torch.from_numpy(np.asarray(file[k])) for k in file.files}


@pytest.fixture(scope="module")
def nuteprune():
    with np.load(GOLDEN / "nuteprune.npz") as file:
        return {k: torch.from_numpy(np.asarray(file[k])) for k in file.files}


def rows(t):
    return t.reshape(-1, t.shape[-1])


def alphas(golden, tag="target"):
    return {n: golden[f"{tag}.loga.{n}"].clone().requires_grad_() for n in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tag", ["target", "global"])
def test_gates_are_those_of_sheared_llama(sheared, tag, name):
    log_alpha = sheared[f"{tag}.loga.{name}"]
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(open_probability(log_alpha), sheared[f"{tag}.score.{name}"], **close)
    drawn = sample(log_alpha, sheared[f"{tag}.eps.{name}"])
    expected = sheared[f"{tag}.sampled.{name}"].reshape(log_alpha.shape)
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-6)
    target = {"layer": 1, "head": 1, "intermediate": 6, "hidden": 4}[name]
    closed = (
        target if tag == "target" else None
    )  # with a target shape they close as many as it says
    found = torch.stack([deterministic(a, closed) for a in rows(log_alpha)])
    found = found.reshape(log_alpha.shape)
    expected = sheared[f"{tag}.deterministic.{name}"].reshape(log_alpha.shape)
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("step", [0, 3, 10, 50])
def test_constraints_of_each_kind_are_those_of_sheared_llama(sheared, step):
    given, targets = alphas(sheared), (1 / 3, 0.25, 0.3, 0.25)
    names = [f"target.lambda.lambda_{i}_{n}" for n in NAMES for i in (1, 2)]
    multipliers = torch.stack([sheared[n] for n in names]).reshape(4, 2).requires_grad_()
    gaps = [
        (1 - open_probability(a)).mean(-1) - t * ramp(step, 10)
        for a, t in zip(given.values(), targets, strict=True)
    ]
    value = lagrangian(multipliers, gaps)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(sheared[f"target.lag.{step}"]), abs=1e-6)
    for i, name in enumerate(NAMES):
        expected = sheared[f"target.lag.{step}.grad.{name}"]
        torch.testing.assert_close(given[name].grad, expected, rtol=1e-5, atol=1e-6)
        for k in (0, 1):
            ascent = float(sheared[f"target.lag.{step}.gradlambda.lambda_{k + 1}_{name}"])
            assert float(multipliers.grad[i, k]) == pytest.approx(ascent, abs=1e-6)


def small_llama():
    """The sizes of the authors' test: 3 blocks of 4 heads and 20 neurons, 16 channels."""
    return tiny_model("llama", layers=3, hidden=16, ffn=20, heads=4, kv=4, head_dim=4)


def in_matrices(model, groups, opened):
    """Expected parameters of the blocks' matrices alone, as the authors count."""
    total = ExpectedSize(model, groups, torch.device("cpu"))(opened)
    by_kind = {g.kind: p for g, p in zip(groups, opened, strict=True)}
    hidden = by_kind["hidden"].double().sum() if "hidden" in by_kind else 16
    blocks = by_kind["blocks"].double().sum() if "blocks" in by_kind else 3
    return total - 2 * 128 * hidden - (2 * blocks + 1) * hidden


def groups_with(model, found, golden, tag):
    """Groups of the model, each with the probabilities of the authors' module for it."""
    layered = {"heads": "head", "neurons": "intermediate"}
    opened, groups = [], []
    for g in found:
        name = layered.get(g.kind, {"hidden": "hidden", "blocks": "layer"}.get(g.kind))
        if f"{tag}.loga.{name}" not in golden:
            continue
        log_alpha = golden[f"{tag}.loga.{name}"]
        row = log_alpha[g.layer] if g.kind in layered else log_alpha
        opened.append(open_probability(row.clone()))
        groups.append(g)
    return groups, opened


def test_expected_parameters_are_those_of_sheared_llama_and_nuteprune(sheared, nuteprune):
    model = small_llama()
    found = graph.discover(model)
    size = float(in_matrices(model, *groups_with(model, found, sheared, "target")))
    assert size == pytest.approx(float(sheared["target.expected_params"]), rel=1e-6)
    for tag in ("hhh", "nohidden"):
        size = float(in_matrices(model, *groups_with(model, found, nuteprune, tag)))
        theirs = float(nuteprune[f"{tag}.expected_sparsity.0"])
        assert 1 - size / 5952 == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("step", [0, 4, 10, 30])
def test_one_constraint_on_all_is_that_of_nuteprune(nuteprune, step):
    gap = nuteprune["hhh.expected_sparsity.0"] - 0.25 * ramp(step, 10)
    multipliers = torch.zeros(1, 2, requires_grad=True)
    lagrangian(multipliers, [gap[None]]).backward()
    expected = nuteprune[f"hhh.lag.{step}.gradlambda"].float()
    torch.testing.assert_close(multipliers.grad[0], expected, rtol=1e-5, atol=1e-6)


def test_gates_open_as_often_as_the_closed_form_says():
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 2.0])
    noise = torch.rand(100_000, 4, generator=torch.Generator().manual_seed(0))
    share = (sample(log_alpha, noise) > 0).float().mean(0)
    torch.testing.assert_close(share, open_probability(log_alpha), rtol=0, atol=5e-3)


def test_the_slope_is_the_derivative():
    noise = torch.rand(200, generator=torch.Generator().manual_seed(0))
    log_alpha = torch.linspace(-4, 4, 200, requires_grad=True)
    sample(log_alpha, noise).sum().backward()
    torch.testing.assert_close(slope(log_alpha.detach(), noise), log_alpha.grad)


@pytest.mark.parametrize("arch", ["llama", "mixtral", "gpt2"])
def test_the_expected_size_is_the_mean_over_all_masks(arch):
    """Brute force: each choice of units of five groups' first units, with its probability."""
    model = tiny_model(arch)
    total = sum(p.numel() for p in model.parameters())
    found = [g for g in graph.discover(model) if g.kind in ("heads", "neurons", "hidden", "blocks")]
    groups = [next(g for g in found if g.kind == k) for k in dict.fromkeys(g.kind for g in found)]
    size = ExpectedSize(model, groups, torch.device("cpu"))
    chance = torch.tensor([0.3, 0.6, 0.8, 0.9])[: len(groups)]
    mean = 0.0
    for stays in itertools.product([0, 1], repeat=len(groups)):
        opened = [torch.ones(g.units) for g in groups]
        for p, stay in zip(opened, stays):
            p[0] = stay
        weight = torch.where(torch.tensor(stays).bool(), chance, 1 - chance).prod()
        mean += float(weight) * float(size(opened))
    opened = [torch.ones(g.units) for g in groups]
    for p, c in zip(opened, chance):
        p[0] = c
    assert float(size([torch.ones(g.units) for g in groups])) == total
    assert float(size(opened)) == pytest.approx(mean, rel=1e-7)


def test_units_that_stay_keep_their_order():
    log_alpha = torch.tensor([2.0, -2.0, 0.5])
    assert soft(log_alpha).argsort().tolist() == [1, 2, 0]
    assert (deterministic(log_alpha) == 0).tolist() == [False, True, False]
