"""FLAP against its formulas on stored inputs, the exact gain of its bias, and grouped queries."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import llama_groups, tiny_llama

from prunekit.activations.runs import WholeRun
from prunekit.criteria.flap import flap, wanda_sp
from prunekit.errors import ConfigError
from prunekit.selection import units as select
from prunekit.solvers.bias_compensation import add_biases, lost_means
from prunekit.types import Group

UNITS = ("heads", "neurons")


@pytest.fixture
def model():
    return tiny_llama()


def inputs(model, tokens, names):
    """name -> (N * T, in) inputs of the linear modules."""
    seen = {}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda _m, a, n=n: seen.update({n: a[0].flatten(0, 1)})
        )
        for n in names
    ]
    with torch.no_grad():
        model(tokens)
    for h in hooks:
        h.remove()
    return seen


def reader_of(group: Group) -> str:
    kind = "self_attn.o_proj" if group.kind == "heads" else "mlp.down_proj"
    return f"model.layers.{group.layer}.{kind}"


def plain(model, groups, tokens, metric, standardize):
    x = inputs(model, tokens, [reader_of(g) for g in groups])
    scores = {}
    for g in groups:
        W, z = model.get_submodule(reader_of(g)).weight.detach(), x[reader_of(g)]
        var = ((z - z.mean(0)) ** 2).mean(0)
        s = {
            "WIFV": var * (W**2).sum(0),
            "IFV": var,
            "WIFN": W.abs().mean(0) * (z**2).mean(0).sqrt(),
        }[metric]
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
    got = flap(model, groups, WholeRun(model, tokens), metric=metric, standardize=standardize)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_wanda_sp_is_wanda_summed_over_columns(model, tokens):
    groups = llama_groups(model, UNITS)
    got = wanda_sp(model, groups, WholeRun(model, tokens))
    x = inputs(model, tokens, [reader_of(g) for g in groups])
    for g in groups:
        W = model.get_submodule(reader_of(g)).weight.detach()
        wanda = W.abs() * x[reader_of(g)].norm(dim=0)  # one score a weight
        want = wanda.sum(0).view(g.units, -1).sum(1)
        torch.testing.assert_close(
            got[g.name] / got[g.name].sum(), want / want.sum(), rtol=1e-4, atol=1e-7
        )


def test_skipped_tokens_take_no_part(model, tokens):
    groups = llama_groups(model, UNITS)
    got = flap(model, groups, WholeRun(model, tokens), skip=2)
    x = inputs(model, tokens, [reader_of(g) for g in groups])
    for g in groups:
        z = x[reader_of(g)].unflatten(0, tokens.shape)[:, 2:].flatten(0, 1)
        s = z.var(0, unbiased=False) * model.get_submodule(
            reader_of(g)
        ).weight.detach().square().sum(0)
        want = ((s - s.mean()) / s.std()).view(g.units, -1).mean(1)
        torch.testing.assert_close(got[g.name], want, rtol=1e-4, atol=1e-5)


def choice(groups):
    """Half of the units of every group, drawn."""
    rng = torch.Generator().manual_seed(3)
    return select.local(
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
    """Card 2's check: the output's mean squared error falls by |W_P E[x_P]|^2 (GQA: a kv head owns
    the columns of its own queries).
    """
    [group] = [g for g in llama_groups(model, (kind,)) if g.layer == 0]
    kept = choice([group])
    x = inputs(model, tokens, [reader_of(group)])[reader_of(group)]
    lost = lost_means(model, [group], kept, WholeRun(model, tokens))
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
    run = WholeRun(model, tokens)
    flap(model, groups, run, skip=2)
    used, fresh = (
        lost_means(model, groups, kept, run, skip),
        lost_means(model, groups, kept, WholeRun(model, tokens), skip),
    )
    x = inputs(model, tokens, list(used))
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
    lost = lost_means(model, groups, kept, WholeRun(model, tokens))
    add_biases(model, lost)
    for name, old in before.items():
        torch.testing.assert_close(model.get_submodule(name).bias.detach(), old + lost[name])


def test_nothing_removed_changes_nothing(model, tokens):
    groups = llama_groups(model, UNITS)
    kept = {g.name: torch.ones(g.units, dtype=torch.bool) for g in groups}
    assert lost_means(model, groups, kept, WholeRun(model, tokens)) == {}


def test_residual_channels_cannot_be_compensated(model, tokens):
    [group] = llama_groups(model, ("hidden",))
    kept = {"hidden": torch.arange(group.units) > 2}
    with pytest.raises(ConfigError, match=r"cannot make up for hidden"):
        lost_means(model, [group], kept, WholeRun(model, tokens))


def test_units_without_a_reader_are_refused(model, tokens):
    import dataclasses

    [group] = [g for g in llama_groups(model, ("neurons",)) if g.layer == 0]
    bare = dataclasses.replace(group, members=group.members[:2])
    with pytest.raises(ConfigError, match=r"no linear module reads"):
        flap(model, [bare], WholeRun(model, tokens))


# ---- through the one-shot pruner


def prune(model, tokens, share=0.4, **options):
    from functools import partial

    from prunekit.excludes.ranges import none
    from prunekit.pruners.oneshot import oneshot
    from prunekit.ratios.uniform import uniform

    ratio = partial(uniform, target=share, of="prunable")
    return oneshot(
        model,
        tokens,
        flap,
        ratio,
        none,
        verify=False,
        compensate="bias",
        budget="prunable",
        **options,
    )


@pytest.mark.parametrize("ranking", ["local", "kind", "global"])
def test_removed_with_a_bias_is_zeroed_with_a_bias(model, tokens, ranking):
    twin = copy.deepcopy(model)
    small, zeros = (
        prune(model, tokens, ranking=ranking),
        prune(twin, tokens, ranking=ranking, compress=False),
    )
    for name in small.kept:
        assert torch.equal(small.kept[name], zeros.kept[name])
    assert sum(p.numel() for p in small.model.parameters()) < sum(
        p.numel() for p in zeros.model.parameters()
    )
    with torch.no_grad():
        torch.testing.assert_close(
            small.model(tokens).logits, zeros.model(tokens).logits, rtol=1e-4, atol=1e-5
        )
        assert small.model.model.layers[0].mlp.down_proj.bias is not None


def test_the_pool_of_a_kind_keeps_each_kind_s_share(model, tokens):
    kept = prune(model, tokens, ranking="kind").kept
    by_kind = {k: sum(int(m.sum()) for n, m in kept.items() if n.startswith(k)) for k in UNITS}
    local = prune(tiny_llama(), tokens, ranking="local").kept
    want = {k: sum(int(m.sum()) for n, m in local.items() if n.startswith(k)) for k in UNITS}
    assert by_kind == want


def test_the_checkpoint_carries_the_biases(model, tokens, tmp_path):
    from prunekit import checkpoint

    pruned = prune(model, tokens, ranking="global")
    folder = checkpoint.save(
        pruned.model, None, tmp_path / "flap", kept=pruned.kept, groups=pruned.groups
    )
    again, _ = checkpoint.load(folder)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, pruned.model(tokens).logits)


def test_kinds_with_shares_of_their_own(model):
    """FLAP's UL-MM: heads and neurons are given their numbers apart."""
    from prunekit.ratios.uniform import uniform

    groups = llama_groups(model, UNITS)
    counts = uniform(model, groups, None, target=0.25, of="units", by_kind={"heads": 0.4})
    assert {n: c for n, c in counts.items() if n.startswith("heads")} == {
        "heads.0": 1,
        "heads.1": 1,
    }
    assert {n: c for n, c in counts.items() if n.startswith("neurons")} == {
        "neurons.0": 5,
        "neurons.1": 5,
    }
    with pytest.raises(ConfigError, match=r"ratio.of=units"):
        uniform(model, groups, None, target=0.25, by_kind={"heads": 0.4})
