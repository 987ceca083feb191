"""Scores of whole blocks against the papers' formulas written out on stored hidden states,
gradients and physically smaller models.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from reference import tiny_llama

from prunekit.activations.moments import Moments, watch
from prunekit.activations.runs import WholeRun
from prunekit.criteria.angular import angular
from prunekit.criteria.block_influence import block_influence
from prunekit.criteria.shortened_llama import block_magnitude, block_ppl, block_taylor
from prunekit.excludes.ranges import ends, layer_range
from prunekit.scoring.block_ablation import losses_without
from prunekit.selection import units as select
from prunekit.types import Group

L = 6


@pytest.fixture
def model():
    return tiny_llama(num_hidden_layers=L)


def blocks(model, start=0, stop=None) -> Group:
    names = tuple(f"model.layers.{i}" for i in range(len(model.model.layers)))[start:stop]
    return Group("blocks", "blocks", None, len(names), modules=names)


def hidden(model, tokens) -> torch.Tensor:
    """(L + 1, N, T, C): the input of every block and the output of the last one, before the final
    norm.
    """
    seen = []
    hooks = [
        b.register_forward_pre_hook(lambda _m, a: seen.append(a[0])) for b in model.model.layers
    ]
    hooks.append(model.model.layers[-1].register_forward_hook(lambda _m, _a, out: seen.append(out)))
    with torch.no_grad():
        model(tokens)
    for h in hooks:
        h.remove()
    return torch.stack(seen)


def without(model, gone):
    """A copy that physically lacks these blocks."""
    small = copy.deepcopy(model)
    small.model.layers = torch.nn.ModuleList(
        [b for i, b in enumerate(small.model.layers) if i not in gone]
    )
    small.config.num_hidden_layers = len(small.model.layers)
    return small


def make_identity(block):
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()


@pytest.mark.parametrize("skip", [0, 3])
def test_block_influence_is_the_formula(model, tokens, skip):
    x = hidden(model, tokens)[:, :, skip:]
    want = [1 - torch.cosine_similarity(x[i], x[i + 1], dim=-1).mean() for i in range(L)]
    got = block_influence(model, [blocks(model)], WholeRun(model, tokens), skip=skip)["blocks"]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-6)


def test_an_identity_block_has_no_influence_and_goes_first(model, tokens):
    make_identity(model.model.layers[3])
    got = block_influence(model, [blocks(model)], WholeRun(model, tokens))["blocks"]
    assert got[3].abs() < 1e-6
    assert int(got.argmin()) == 3
    with torch.no_grad():
        assert torch.equal(
            model(tokens).logits, without(model, {3})(tokens, use_cache=False).logits
        )


@pytest.mark.parametrize("n", range(1, L + 1))
@pytest.mark.parametrize("tokens_used", ["last", "all"])
def test_angular_takes_exactly_the_run_of_least_angle(model, tokens, n, tokens_used):
    x = hidden(model, tokens)
    x = x[:, :, -1] if tokens_used == "last" else x.flatten(1, 2)
    d = [
        torch.arccos(torch.cosine_similarity(x[i], x[i + n], dim=-1)).mean() / math.pi
        for i in range(L + 1 - n)
    ]
    best = int(torch.stack(d).argmin())
    run = WholeRun(model, tokens, {"blocks": n})
    scores = angular(model, [blocks(model)], run, tokens=tokens_used)["blocks"]
    gone = (~select.lowest(scores, n)).nonzero()[:, 0].tolist()
    assert gone == list(range(best, best + n))
    torch.testing.assert_close(scores[best], d[best], rtol=1e-5, atol=1e-6)


def test_one_block_by_angle_is_one_block_by_last_token_influence(model, tokens):
    """arccos is monotone, so with one sample the two rank alike (card 5's check)."""
    one = tokens[:1]
    x = hidden(model, one)[:, 0, -1]
    influence = torch.stack([1 - torch.cosine_similarity(x[i], x[i + 1], dim=-1) for i in range(L)])
    angles = angular(model, [blocks(model)], WholeRun(model, one, {"blocks": 1}))["blocks"]
    assert int(angles.argmin()) == int(influence.argmin())
    assert (angles.frac().argsort() == influence.argsort()).all()


def test_the_simple_variant_keeps_the_last_block(model, tokens):
    scores = angular(model, [blocks(model)], WholeRun(model, tokens, {"blocks": 3}), choice="last")[
        "blocks"
    ]
    assert (~select.lowest(scores, 3)).nonzero()[:, 0].tolist() == [2, 3, 4]


def test_angular_stays_inside_what_the_exclusion_left(model, tokens):
    group = blocks(model, 2, 5)
    x = hidden(model, tokens)[:, :, -1]
    d = [torch.arccos(torch.cosine_similarity(x[i], x[i + 2], dim=-1)).mean() for i in (2, 3)]
    scores = angular(model, [group], WholeRun(model, tokens, {"blocks": 2}))["blocks"]
    first = int(torch.stack(d).argmin())
    assert (~select.lowest(scores, 2)).nonzero()[:, 0].tolist() == [first, first + 1]


def test_angular_refuses_blocks_with_a_gap(model, tokens):
    group = Group("blocks", "blocks", None, 2, modules=("model.layers.0", "model.layers.2"))
    with pytest.raises(ValueError, match=r"unbroken run"):
        angular(model, [group], WholeRun(model, tokens, {"blocks": 1}))


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_is_the_sum_over_a_block(model, tokens, p):
    want = [sum((w.abs() ** p).sum() for w in b.parameters()) for b in model.model.layers]
    got = block_magnitude(model, [blocks(model)], WholeRun(model, tokens), p=p)["blocks"]
    torch.testing.assert_close(got, torch.stack(want).detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch", [None, 3])
def test_taylor_is_the_sum_of_w_times_gradient(model, tokens, batch):
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    want = torch.stack(
        [sum((w * w.grad).abs().sum() for w in b.parameters()) for b in model.model.layers]
    ).detach()
    model.zero_grad()
    got = block_taylor(model, [blocks(model)], WholeRun(model, tokens), batch=batch)["blocks"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("batch", [4, 3])
def test_ppl_is_that_of_a_model_without_the_block(model, tokens, reuse, batch):
    got = block_ppl(
        model, [blocks(model, 1, 5)], WholeRun(model, tokens), batch=batch, reuse=reuse
    )["blocks"]
    with torch.no_grad():
        want = [
            without(model, {i})(input_ids=tokens, labels=tokens, use_cache=False).loss
            for i in range(1, 5)
        ]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-6)
    assert all(
        "forward" not in vars(b) and not b._forward_hooks and not b._forward_pre_hooks
        for b in model.model.layers
    )


def test_blocks_that_return_tuples(model, tokens):
    class Tupled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return (self.inner(x), None)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(101, 8)
            self.layers = torch.nn.ModuleList([Tupled(torch.nn.Linear(8, 8)) for _ in range(3)])

        def get_input_embeddings(self):
            return self.embed

        def forward(self, input_ids, labels=None, use_cache=None):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer(x)[0]
            return type("Out", (), {"loss": x.square().mean()})()

    torch.manual_seed(0)
    net = Net()
    names = [f"layers.{i}" for i in range(3)]
    run = WholeRun(net, tokens)
    torch.testing.assert_close(
        losses_without(net, names, run, 4), losses_without(net, names, run, 4, reuse=False)
    )


def test_exclusions_narrow_the_blocks(model):
    group = blocks(model)
    assert ends([group], first=1, last=2)[0].modules == tuple(
        f"model.layers.{i}" for i in (1, 2, 3)
    )
    assert layer_range([group], blocks=[2, 4])[0].modules == ("model.layers.2", "model.layers.3")
    assert ends([group], first=5, last=3) == []
    assert layer_range([group], heads=[0, 0], neurons=[0, 0]) == [group]


def test_moments_are_exact_whatever_the_batches():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)) * 3 + 100
    m = Moments(7)
    for part in x.split([1, 19, 30]):
        m.add(part)
    torch.testing.assert_close(m.mean, x.mean(0))
    torch.testing.assert_close(m.variance, x.var(0, unbiased=False), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m.square, x.square().mean(0))


def test_watch_takes_its_hooks_off_after_an_error(model, tokens):
    def burst(_x):
        raise RuntimeError("seen")

    with pytest.raises(RuntimeError, match="seen"), watch(model, outputs={"model.layers.1": burst}):
        model(tokens)
    assert not model.model.layers[1]._forward_hooks


# ---- through the one-shot pruner


def prune(model, tokens, criterion, n, exclude=lambda groups: groups, **options):
    from prunekit.pruners.oneshot import oneshot

    return oneshot(
        model,
        tokens,
        criterion,
        lambda *_: {"blocks": n},
        exclude,
        kinds=["blocks"],
        verify=False,
        **options,
    )


def gone(pruned) -> list[int]:
    return (~pruned.kept["blocks"]).nonzero()[:, 0].tolist()


def loss(model, tokens) -> float:
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()


def test_blocks_go_and_the_rest_computes_what_it_did(model, tokens):
    dense = copy.deepcopy(model)
    pruned = prune(model, tokens, block_influence, 2)
    assert len(pruned.model.model.layers) == pruned.model.config.num_hidden_layers == L - 2
    assert pruned.groups[0].units == L
    with torch.no_grad():
        torch.testing.assert_close(
            pruned.model(tokens).logits,
            without(dense, set(gone(pruned)))(tokens, use_cache=False).logits,
        )


def test_protected_blocks_stay_though_they_score_lowest(model, tokens):
    for i in (0, 5):
        make_identity(model.model.layers[i])
    pruned = prune(model, tokens, block_influence, 3, lambda groups: ends(groups, first=1, last=1))
    assert set(gone(pruned)) < {1, 2, 3, 4}


@pytest.mark.parametrize("kind", ["angular", "last"])
def test_a_contiguous_run_goes(model, tokens, kind):
    def criterion(*args):
        return angular(*args, choice=kind)

    went = gone(prune(model, tokens, criterion, 3))
    assert went == list(range(went[0], went[0] + 3))
    if kind == "last":
        assert went == [2, 3, 4]


def test_greedy_takes_the_best_single_removal_at_every_step(model, tokens):
    """SLEB, card 7: the loss after step k is the least over all single removals at that step; the
    ends stay.
    """
    alive, want = list(range(L)), []
    for _ in range(3):
        trials = {i: loss(without(model, {*want, i}), tokens) for i in alive[1:-1]}
        best = min(trials, key=lambda i: trials[i])
        want.append(best)
        alive.remove(best)
    dense = copy.deepcopy(model)
    pruned = prune(
        model, tokens, block_ppl, 3, lambda groups: ends(groups, first=1, last=1), steps="each"
    )
    assert gone(pruned) == sorted(want)
    assert loss(pruned.model, tokens) == pytest.approx(
        loss(without(dense, set(want)), tokens), rel=1e-5
    )


def test_the_first_greedy_step_is_the_ppl_criterion_and_beats_block_influence(model, tokens):
    greedy = prune(copy.deepcopy(model), tokens, block_ppl, 1, steps="each")
    once = prune(copy.deepcopy(model), tokens, block_ppl, 1)
    short = prune(copy.deepcopy(model), tokens, block_influence, 1)
    assert gone(greedy) == gone(once)
    assert loss(once.model, tokens) <= loss(short.model, tokens)


def test_a_range_means_the_dense_model_s_blocks_at_every_step(model, tokens):
    pruned = prune(
        model, tokens, block_ppl, 2, lambda groups: layer_range(groups, blocks=[1, 4]), steps="each"
    )
    assert len(gone(pruned)) == 2
    assert set(gone(pruned)) < {1, 2, 3}
