"""A budget of parameters spent where units cost least: kept, whoever names it."""

from __future__ import annotations

import pytest
import torch
from blocks import hidden_states
from problems import problem
from tiny_models import tiny_model

from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError, NeedsData
from prunekit.ratios.cost import cost, removal_costs
from prunekit.selection.shares import uniform_counts
from prunekit.solvers.least_squares import prior_ridge, ridge_problem
from prunekit.types import Allocation

KINDS = ("heads", "neurons")
NEURON = 3 * 64
"""Parameters of the smallest unit: a row of gate_proj and up_proj, a column of down_proj."""
PLAIN = {"cost_tokens": 256, "precision": "model"}


@pytest.fixture
def llama():
    return tiny_model("llama", layers=3)


@pytest.fixture
def text():
    """(16, 32) token ids below 100."""
    return torch.randint(8, 100, (16, 32), generator=torch.Generator().manual_seed(0))


def groups_of(model):
    return problem(model).units(KINDS)


@pytest.mark.parametrize(("target", "of"), [(0.2, "model"), (0.35, "prunable"), (0.3, "units")])
def test_the_budget_is_kept_to_a_unit(llama, text, target, of):
    groups = groups_of(llama)
    sizes = Sizes(llama, groups)
    allowed = sizes.removed(uniform_counts(llama, groups, target, of))
    found = cost(problem(llama, text), groups, target=target, of=of, **PLAIN)
    assert found.ranking == "local"
    assert 0 <= allowed - sizes.removed(found.counts) < NEURON
    assert all(found.counts[g.name] < g.units for g in groups)


def test_an_inner_ratio_s_parameters_are_spent(llama, text):
    groups = groups_of(llama)
    sizes = Sizes(llama, groups)
    owl = {"name": "owl", "target": 0.3, "M": 2}
    node = {"name": "cost", "target": None, "inner": owl, **PLAIN}
    allowed = problem(llama, text, ratio=owl).allocate(groups).counts
    found = problem(llama, text, ratio=node).allocate(groups).counts
    assert found != allowed
    assert 0 <= sizes.removed(allowed) - sizes.removed(found) < NEURON


def test_what_others_can_replace_goes_first(llama, text):
    """In one block every second neuron is a copy: these 48 are what 16 of each block pay for."""
    with torch.no_grad():
        mlp = llama.model.layers[1].mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[1::2] = linear.weight[::2]
    groups = groups_of(llama)

    def inner(_problem, _groups):
        return Allocation({f"neurons.{i}": 16 for i in range(3)})

    counts = cost(
        problem(llama, text), groups, target=None, inner=inner, ridge=1e-6, bias=False, **PLAIN
    ).counts
    assert {name: n for name, n in counts.items() if n} == {"neurons.1": 48}


@pytest.mark.parametrize("how", ["relative", "equal"])
def test_a_token_counts_by_the_size_of_what_leaves_the_block_or_as_one(
    llama, text, how, monkeypatch
):
    seen = {}

    def costs(r, stats, ridge, bias):
        seen[r.reader.name] = float(stats.total)
        found = removal_costs(r, stats, ridge, bias)
        W = r.reader.weight.detach().double()
        gram = ridge_problem(stats, W, prior_ridge(W.shape[1]), bias).gram
        # Without any unit all that the reader puts out is gone.
        assert float(found[-1]) == pytest.approx(float((W @ gram * W).sum()) / 256, rel=1e-3)
        return found

    monkeypatch.setattr("prunekit.ratios.cost.removal_costs", costs)
    cost(problem(llama, text), groups_of(llama), token_weight=how, **PLAIN)
    few = text[: 256 // 32]
    for i, state in enumerate(hidden_states(llama, few)[1:]):
        size = state.square().mean(-1)
        wanted = size.reciprocal().sum() if how == "relative" else size.numel()
        assert seen[f"model.layers.{i}.mlp.down_proj"] == pytest.approx(float(wanted), rel=1e-4)


def test_only_the_first_tokens_tell_the_costs(llama, text):
    groups = groups_of(llama)
    few = {"target": 0.2, "cost_tokens": 64, "precision": "model"}
    whole = cost(problem(llama, text), groups, **few)
    part = cost(problem(llama, text[:2]), groups, **few)
    other = cost(problem(llama, text[2:]), groups, **few)
    assert whole == part != other


@pytest.mark.parametrize(
    "options",
    [
        {"target": 0.2, "inner": {"name": "uniform"}},
        {"target": None},
        {"target": None, "inner": None},
    ],
)
def test_one_of_target_and_inner_ratio_is_given(llama, text, options):
    with pytest.raises(ConfigError, match="give one"):
        problem(llama, text, ratio={"name": "cost", **options}).allocate(groups_of(llama))


def test_shapes_tell_what_cannot_be_but_not_the_counts():
    model = tiny_model("llama", meta=True)
    groups = groups_of(model)
    with pytest.raises(NeedsData):
        problem(model, ratio={"name": "cost"}).allocate(groups)
    with pytest.raises(ConfigError, match="cannot be removed"):
        problem(model, ratio={"name": "cost", "target": 0.99}).allocate(groups)
    experts = tiny_model("mixtral", meta=True)
    with pytest.raises(ConfigError, match="have none"):
        problem(experts, ratio={"name": "cost"}).allocate(groups_of(experts))
