"""The exact gain of the bias that removed units leave behind."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import inputs_of, llama_groups, reader_of, tiny_llama

from prunekit.activations.runs import ModelRun
from prunekit.criteria.flap import flap
from prunekit.errors import ConfigError
from prunekit.selection.units import keep_local
from prunekit.solvers.bias_compensation import add_biases, lost_means

UNITS = ("heads", "neurons")


@pytest.fixture
def model():
    return tiny_llama()


def choice(groups):
    """Half of the units of every group, drawn."""
    rng = torch.Generator().manual_seed(3)
    return keep_local(
        {g.name: torch.rand(g.units, generator=rng) for g in groups},
        {g.name: g.units // 2 for g in groups},
    )


def zeroed(model, groups, kept):
    small = copy.deepcopy(model)
    for g in groups:
        for m in g.members:
            w = small.get_parameter(m.param).data
            w.index_fill_(m.axis, m.index[~kept[g.name]].flatten(), 0)
    return small


@pytest.mark.parametrize("kind", UNITS)
def test_the_bias_takes_exactly_the_mean_off_the_error(model, tokens, kind):
    """The output's mean squared error falls by |W_P E[x_P]|^2; a key head owns the columns of its
    own queries.
    """
    [group] = [g for g in llama_groups(model, (kind,)) if g.layer == 0]
    kept = choice([group])
    x = inputs_of(model, tokens, [reader_of(group)])[reader_of(group)]
    lost = lost_means(model, [group], kept, ModelRun(model, tokens))
    assert list(lost) == [reader_of(group)]
    W = model.get_submodule(reader_of(group)).weight.detach()
    small = zeroed(model, [group], kept)
    less = small.get_submodule(reader_of(group)).weight.detach()

    def error(bias):
        return ((x @ W.T) - (x @ less.T + bias)).square().sum(1).mean()

    gain = lost[reader_of(group)].square().sum()
    torch.testing.assert_close(error(0) - error(lost[reader_of(group)]), gain, rtol=1e-4, atol=1e-6)
    assert gain > 0
    add_biases(small, lost)
    torch.testing.assert_close(
        small.get_submodule(reader_of(group)).bias.detach(), lost[reader_of(group)]
    )


@pytest.mark.parametrize("skip", [0, 2])
def test_the_bias_does_not_depend_on_what_the_criterion_looked_at(model, tokens, skip):
    """Scores may come from the cache: then the criterion has left nothing on the run."""
    groups = llama_groups(model, UNITS)
    kept = choice(groups)
    run = ModelRun(model, tokens)
    flap(model, groups, run, skip=2)
    used = lost_means(model, groups, kept, run, skip)
    fresh = lost_means(model, groups, kept, ModelRun(model, tokens), skip)
    x = inputs_of(model, tokens, list(used))
    for name, bias in used.items():
        assert torch.equal(bias, fresh[name])
        [group] = [g for g in groups if reader_of(g) == name]
        gone = group.members[-1].index[~kept[group.name]].flatten()
        mean = x[name].unflatten(0, tokens.shape)[:, skip:].mean((0, 1))
        torch.testing.assert_close(
            bias,
            model.get_submodule(name).weight.detach()[:, gone] @ mean[gone],
            rtol=1e-4,
            atol=1e-6,
        )


def test_a_bias_that_is_there_is_added_to(tokens):
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    groups = llama_groups(model, UNITS)
    kept = choice(groups)
    before = {reader_of(g): model.get_submodule(reader_of(g)).bias.detach().clone() for g in groups}
    lost = lost_means(model, groups, kept, ModelRun(model, tokens))
    add_biases(model, lost)
    for name, old in before.items():
        torch.testing.assert_close(model.get_submodule(name).bias.detach(), old + lost[name])


def test_nothing_removed_changes_nothing(model, tokens):
    groups = llama_groups(model, UNITS)
    kept = {g.name: torch.ones(g.units, dtype=torch.bool) for g in groups}
    assert lost_means(model, groups, kept, ModelRun(model, tokens)) == {}


def test_residual_channels_cannot_be_compensated(model, tokens):
    [group] = llama_groups(model, ("hidden",))
    kept = {"hidden": torch.arange(group.units) > 2}
    with pytest.raises(ConfigError, match=r"cannot make up for hidden"):
        lost_means(model, [group], kept, ModelRun(model, tokens))
