"""FLAP against its formulas on stored inputs, and grouped queries."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from foreign import ListedMixtral, with_an_idle_expert
from reference import inputs_of, llama_groups, reader_of, tiny_llama
from tiny_models import tiny_model

from prunekit import graph
from prunekit.activations.hooks import hook_activations
from prunekit.activations.runs import ModelRun
from prunekit.architecture.linear import readers
from prunekit.criteria.flap import flap, wanda_sp
from prunekit.errors import ConfigError

UNITS = ("heads", "neurons")


@pytest.fixture
def model():
    return tiny_llama()


def plain(model, groups, tokens, metric, standardize, squared=False):
    x = inputs_of(model, tokens, [reader_of(g) for g in groups])
    scores = {}
    for g in groups:
        W, z = model.get_submodule(reader_of(g)).weight.detach(), x[reader_of(g)]
        var = ((z - z.mean(0)) ** 2).mean(0)
        s = {
            "WIFV": var * (W**2).sum(0),
            "IFV": var,
            "WIFN": W.abs().mean(0) * (z**2).mean(0).sqrt(),
        }[metric]
        if squared and g.kind == "heads":
            s = s**2
        if standardize:
            s = (s - s.mean()) / s.std()
        scores[g.name] = s.view(g.units, -1).mean(
            1
        )  # rep * D consecutive channels of o_proj belong to one kv head
    return scores


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("metric", ["WIFV", "IFV", "WIFN"])
def test_scores_are_the_formula(model, tokens, metric, standardize):
    groups = llama_groups(model, UNITS)
    want = plain(model, groups, tokens, metric, standardize)
    got = flap(model, groups, ModelRun(model, tokens), metric=metric, standardize=standardize)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_the_authors_square_what_heads_score(model, tokens):
    groups = llama_groups(model, UNITS)
    want = plain(model, groups, tokens, "WIFV", True, squared=True)
    got = flap(model, groups, ModelRun(model, tokens), heads="squared")
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_wanda_sp_is_wanda_summed_over_columns(model, tokens):
    groups = llama_groups(model, UNITS)
    got = wanda_sp(model, groups, ModelRun(model, tokens))
    x = inputs_of(model, tokens, [reader_of(g) for g in groups])
    for g in groups:
        W = model.get_submodule(reader_of(g)).weight.detach()
        wanda = W.abs() * x[reader_of(g)].norm(dim=0)  # one score a weight
        want = wanda.sum(0).view(g.units, -1).sum(1)
        torch.testing.assert_close(
            got[g.name] / got[g.name].sum(), want / want.sum(), rtol=1e-4, atol=1e-7
        )


def test_skipped_tokens_take_no_part(model, tokens):
    groups = llama_groups(model, UNITS)
    got = flap(model, groups, ModelRun(model, tokens), skip=2)
    x = inputs_of(model, tokens, [reader_of(g) for g in groups])
    for g in groups:
        z = x[reader_of(g)].unflatten(0, tokens.shape)[:, 2:].flatten(0, 1)
        s = z.var(0, unbiased=False) * model.get_submodule(
            reader_of(g)
        ).weight.detach().square().sum(0)
        want = ((s - s.mean()) / s.std()).view(g.units, -1).mean(1)
        torch.testing.assert_close(got[g.name], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", [flap, wanda_sp])
def test_neurons_of_an_expert_without_a_token_score_zero(criterion, tokens):
    torch.manual_seed(0)
    model = with_an_idle_expert(ListedMixtral()).eval()
    groups = [g for g in graph.discover(model) if g.kind == "neurons"]
    found = criterion(model, groups, ModelRun(model, tokens % 97))
    idle = {g.name for g in groups if ".experts.4." in g.members[0].param}
    assert len(groups) == 15
    assert len(idle) == 3
    for name, scores in found.items():
        assert bool((scores == 0).all()) == (name in idle), name


def test_units_without_a_reader_are_refused(model, tokens):
    [group] = [g for g in llama_groups(model, ("neurons",)) if g.layer == 0]
    bare = dataclasses.replace(group, members=group.members[:2])
    with pytest.raises(ConfigError, match=r"no linear module reads"):
        flap(model, [bare], ModelRun(model, tokens))


def test_skipped_tokens_are_found_in_a_flat_list_of_them(tokens):
    """OPT's feed-forward reads samples and tokens along one axis."""
    model, tokens = tiny_model("opt"), tokens % 60 + 3
    groups = [g for g in graph.discover(model) if g.kind == "neurons"]
    names = {g.name: readers(model, g)[0].name for g in groups}
    seen: dict[str, torch.Tensor] = {}
    watched = {name: partial(seen.__setitem__, name) for name in names.values()}
    with hook_activations(model, watched):
        model(input_ids=tokens)
    got = flap(model, groups, ModelRun(model, tokens), metric="IFV", standardize=False, skip=2)
    for name, reader in names.items():
        z = seen[reader].unflatten(0, tokens.shape)[:, 2:].flatten(0, 1)
        torch.testing.assert_close(got[name], z.var(0, unbiased=False), rtol=1e-4, atol=1e-6)


def test_an_expert_counts_all_of_its_tokens(tokens):
    torch.manual_seed(0)
    model, tokens = ListedMixtral().eval(), tokens % 97
    groups = [g for g in graph.discover(model) if g.kind == "neurons"]
    found, skipped = (
        flap(model, groups, ModelRun(model, tokens), standardize=False, skip=s) for s in (0, 2)
    )
    for name in found:
        torch.testing.assert_close(skipped[name], found[name])
