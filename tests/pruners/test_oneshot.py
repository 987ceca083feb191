"""One-shot and iterative pruning: whole blocks, and FLAP's units with the bias they leave."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import lacking, make_identity
from problems import problem, uniform
from reference import tiny_llama
from tiny_models import tiny_model

from prunekit import checkpoint
from prunekit.criteria.block_influence import block_influence
from prunekit.criteria.flap import flap
from prunekit.criteria.shortened_llama import block_ppl
from prunekit.errors import ConfigError
from prunekit.excludes.ranges import ends, layer_range
from prunekit.pruners.oneshot import oneshot
from prunekit.types import Allocation

L = 6
UNITS = ("heads", "neurons")


@pytest.fixture
def model():
    return tiny_llama(num_hidden_layers=L)


def drop(model, tokens, criterion, n, exclude=None, **options):
    """Takes `n` whole blocks."""

    def ratio(_problem, _groups):
        return Allocation({"blocks": n})

    posed = problem(model, tokens, criterion=criterion, ratio=ratio, exclude=exclude)
    return oneshot(posed, kinds=["blocks"], **options)


def gone(pruned) -> list[int]:
    return (~pruned.kept["blocks"]).nonzero()[:, 0].tolist()


def loss(model, tokens) -> float:
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()


def test_blocks_go_and_the_rest_computes_what_it_did(model, tokens):
    dense = copy.deepcopy(model)
    pruned = drop(model, tokens, block_influence, 2)
    assert len(pruned.model.model.layers) == pruned.model.config.num_hidden_layers == L - 2
    assert pruned.groups[0].units == L
    with torch.no_grad():
        torch.testing.assert_close(
            pruned.model(tokens).logits,
            lacking(dense, set(gone(pruned)))(tokens, use_cache=False).logits,
        )


def test_protected_blocks_stay_though_they_score_lowest(model, tokens):
    for i in (0, 5):
        make_identity(model.model.layers[i])
    pruned = drop(model, tokens, block_influence, 3, lambda groups: ends(groups, first=1, last=1))
    assert set(gone(pruned)) < {1, 2, 3, 4}


@pytest.mark.parametrize("kind", ["angular", "last"])
def test_a_contiguous_run_goes(model, tokens, kind):
    went = gone(drop(model, tokens, {"name": "angular", "choice": kind}, 3))
    assert went == list(range(went[0], went[0] + 3))
    if kind == "last":
        assert went == [2, 3, 4]


def test_greedy_takes_the_best_single_removal_at_every_step(model, tokens):
    """SLEB: the loss after step k is the least over all single removals at that step; the
    ends stay.
    """
    alive, want = list(range(L)), []
    for _ in range(3):
        trials = {i: loss(lacking(model, {*want, i}), tokens) for i in alive[1:-1]}
        best = min(trials, key=lambda i: trials[i])
        want.append(best)
        alive.remove(best)
    dense = copy.deepcopy(model)
    pruned = drop(
        model, tokens, block_ppl, 3, lambda groups: ends(groups, first=1, last=1), steps="each"
    )
    assert gone(pruned) == sorted(want)
    assert loss(pruned.model, tokens) == pytest.approx(
        loss(lacking(dense, set(want)), tokens), rel=1e-5
    )


def test_the_first_greedy_step_is_the_ppl_criterion_and_beats_block_influence(model, tokens):
    greedy = drop(copy.deepcopy(model), tokens, block_ppl, 1, steps="each")
    once = drop(copy.deepcopy(model), tokens, block_ppl, 1)
    short = drop(copy.deepcopy(model), tokens, block_influence, 1)
    assert gone(greedy) == gone(once)
    assert loss(once.model, tokens) <= loss(short.model, tokens)


def test_a_range_means_the_dense_model_s_blocks_at_every_step(model, tokens):
    pruned = drop(
        model, tokens, block_ppl, 2, lambda groups: layer_range(groups, blocks=[1, 4]), steps="each"
    )
    assert len(gone(pruned)) == 2
    assert set(gone(pruned)) < {1, 2, 3}


@pytest.mark.parametrize("redraw", [False, True])
def test_steps_score_on_samples_of_their_own_or_on_all(model, tokens, redraw):
    seen = []

    def watched(model, groups, run):
        seen.append(run.tokens)
        return block_influence(model, groups, run)

    drop(model, tokens, watched, 3, steps=3, redraw=redraw)
    assert len(seen) == 3
    if not redraw:
        assert all(torch.equal(s, tokens) for s in seen)
    else:
        assert [s.tolist() for s in seen] == [tokens[i::3].tolist() for i in range(3)]


def test_fewer_samples_than_steps_are_refused(model, tokens):
    with pytest.raises(ConfigError, match=r"5 steps need calib.samples=5 or more, there are 4"):
        drop(model, tokens, block_influence, 5, steps="each", redraw=True)


# ---- FLAP


@pytest.fixture
def shallow():
    return tiny_llama()


def flap_pruned(model, tokens, ranking="local", **options):
    ratio = uniform(0.4, "prunable", ranking=ranking, budget="parameters")
    return oneshot(
        problem(model, tokens, criterion=flap, ratio=ratio), compensate="bias", **options
    )


@pytest.mark.parametrize("ranking", ["local", "kind", "global"])
def test_removed_with_a_bias_is_zeroed_with_a_bias(shallow, tokens, ranking):
    twin = copy.deepcopy(shallow)
    small, zeros = (
        flap_pruned(shallow, tokens, ranking=ranking),
        flap_pruned(twin, tokens, ranking=ranking, remove=False),
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


def test_the_pool_of_a_kind_keeps_each_kind_s_share(shallow, tokens):
    kept = flap_pruned(shallow, tokens, ranking="kind").kept
    by_kind = {k: sum(int(m.sum()) for n, m in kept.items() if n.startswith(k)) for k in UNITS}
    local = flap_pruned(tiny_llama(), tokens, ranking="local").kept
    want = {k: sum(int(m.sum()) for n, m in local.items() if n.startswith(k)) for k in UNITS}
    assert by_kind == want


def test_the_checkpoint_carries_the_biases(shallow, tokens, tmp_path):
    pruned = flap_pruned(shallow, tokens, ranking="global")
    folder = checkpoint.save(
        pruned.model, None, tmp_path / "flap", kept=pruned.kept, groups=pruned.groups
    )
    again, _ = checkpoint.load(folder)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, pruned.model(tokens).logits)


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe"])
def test_what_was_zeroed_before_is_not_chosen_anew(arch, tokens):
    """AIMER scores a zeroed expert above every other one."""
    model = tiny_model(arch)
    posed = problem(model, tokens, criterion={"name": "aimer"}, ratio=uniform(0.5))
    out = oneshot(posed, kinds=["experts"], steps="each", remove=False)
    stacks = [p for name, p in model.named_parameters() if "experts" in name and p.dim() == 3]
    assert stacks
    for name, mask in out.kept.items():
        assert int((~mask).sum()) == out.notes["counts"][name] == 3
    zero = [(p == 0).flatten(1).all(1) for p in stacks]
    assert [int(z.sum()) for z in zero] == [3] * len(zero)


@pytest.mark.parametrize("arch", ["opt", "gemma2"])
def test_groups_that_are_no_more_count_in_a_ranking_of_all(arch, tokens):
    """Of one head left there is no group, or one of other units: the budget is that of one step."""
    model = tiny_model(arch)
    ratio = uniform(0.4, "model", ranking="global")
    by = {"name": "taylor", "mode": "param_second", "reduce": "prod"}
    before = sum(p.numel() for p in model.parameters())
    out = oneshot(problem(model, tokens, criterion=by, ratio=ratio), steps=3)
    gone = 1 - sum(p.numel() for p in out.model.parameters()) / before
    assert gone == pytest.approx(0.4, abs=0.005)
    assert {g.name for g in out.groups} == out.kept.keys()
