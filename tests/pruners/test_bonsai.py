"""Bonsai: exact counts, forwards only, masks that come off, units in the order of their worth."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from problems import check, problem, uniform
from tiny_models import logits, tiny_model

from prunekit import graph
from prunekit.activations.runs import ModelRun
from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError
from prunekit.pruners import bonsai
from prunekit.registry import pruners
from prunekit.types import Allocation


def prune(model, tokens, share=0.3, of="prunable", exclude=None, ranking="local", **options):
    pruner = pruners.build({"name": "bonsai", "masks": 20, "rounds": 2, **options})
    ratio = uniform(share, of, ranking=ranking)
    return pruner(problem(model, tokens, ratio=ratio, exclude=exclude))


@pytest.fixture
def llama():
    return tiny_model("llama", layers=3)


def test_ratio_zero_changes_nothing(llama, tokens):
    before = copy.deepcopy(llama.state_dict())
    assert prune(llama, tokens, share=0.0).kept == {}
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())


def test_counts_are_exact(llama, tokens):
    out = prune(llama, tokens, share=0.5, of="units", rounds=3)
    assert out.notes["counts"] == {
        f"{kind}.{i}": n for i in range(3) for kind, n in (("heads", 1), ("neurons", 48))
    }
    assert len(out.notes["rounds"]) == 3
    for layer in llama.model.layers:
        assert layer.mlp.down_proj.weight.shape == (64, 48)
        assert layer.self_attn.k_proj.out_features == 20


def test_the_budget_is_kept_where_all_compete(llama, tokens):
    allowed, total = copy.deepcopy(llama), sum(p.numel() for p in llama.parameters())
    prune(allowed, tokens, share=0.2, of="model")
    out = prune(llama, tokens, share=0.2, of="model", ranking="global")
    size = [sum(p.numel() for p in m.parameters()) for m in (allowed, llama)]
    assert 0 <= size[1] - size[0] <= 5120  # parameters of a head
    assert size[1] == pytest.approx(0.8 * total, rel=0.03)
    assert all(kept.any() for kept in out.kept.values())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "falcon", "gemma2", "bloom"])
def test_what_remains_are_the_dense_weights(arch, tokens):
    """Masks come off, nothing is refitted, and zeroing equals removing."""
    dense, smaller, zeroed = (tiny_model(arch) for _ in range(3))
    out = prune(smaller, tokens, ranking="global")
    same = prune(zeroed, tokens, ranking="global", remove=False)
    assert all(torch.equal(kept, same.kept[name]) for name, kept in out.kept.items())
    graph.remove(dense, out.kept)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), smaller.parameters()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in smaller.modules())
    torch.testing.assert_close(
        logits(zeroed, tokens), logits(smaller, tokens), rtol=1e-3, atol=1e-4
    )


def test_masks_need_no_gradient(llama, tokens):
    modes, head = [], llama.lm_head

    def note(module, *_):
        if module is head:  # not that of a copy, on which discovery proves its groups
            modes.append(torch.is_inference_mode_enabled())

    head.register_forward_hook(note)
    prune(llama, tokens, rounds=1)
    assert len(modes) == 20
    assert all(modes)


@pytest.mark.parametrize("batch", [None, 3])
def test_a_seed_decides(llama, tokens, batch):
    kept = [prune(copy.deepcopy(llama), tokens, seed=seed, batch=batch).kept for seed in (1, 1, 2)]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert not all(torch.equal(kept[0][name], kept[2][name]) for name in kept[0])


def test_losses_are_those_of_a_model_without_the_units(llama, tokens):
    groups = problem(llama).units(["heads", "neurons"])
    gates = bonsai.Gates.open(groups, torch.device("cpu"))
    gates.kept["neurons.1"][:9] = False
    masks = [{"neurons.0": torch.tensor([1, 2])}, {"heads.2": torch.tensor([1])}, {}]
    with graph.gated(llama, groups, gates.z):
        found = bonsai.log_perplexities(ModelRun(llama, tokens), gates, masks, batch=3)
    for mask, loss in zip(masks, found):
        kept = {g.name: gates.kept[g.name].clone() for g in groups}
        for name, off in mask.items():
            kept[name][off] = False
        without = graph.zero(copy.deepcopy(llama), kept)
        with torch.no_grad():
            plain = without(tokens, labels=tokens).loss
        assert float(loss) == pytest.approx(float(plain), rel=1e-4)


class Losses:
    """A run whose forwards have given losses."""

    def __init__(self, model, losses):
        self.model, self.tokens, self._losses = model, torch.zeros(1, 4), iter(losses)

    def losses(self, batch):
        yield SimpleNamespace(loss=torch.tensor(next(self._losses)))


def test_a_mask_that_breaks_the_model_counts_as_the_worst(llama):
    gates = bonsai.Gates.open(problem(llama).units(["neurons"]), torch.device("cpu"))
    run = Losses(llama, [3.0, math.nan, math.inf, 1e9])
    found = bonsai.log_perplexities(run, gates, [{}] * 4, None)
    assert found.tolist() == pytest.approx([3.0] + 3 * [bonsai.WORST])
    with pytest.raises(ConfigError, match="no mask leaves a finite perplexity"):
        bonsai.log_perplexities(Losses(llama, [math.nan]), gates, [{}], None)


@pytest.mark.parametrize("utility", ["log_perplexity", "perplexity"])
def test_units_go_in_the_order_of_their_worth(llama, tokens, utility, monkeypatch):
    """Where the loss is a sum over units: of those that are tried the least worth go, whatever
    their priors.
    """
    rng = torch.Generator().manual_seed(3)
    worth = {f"neurons.{i}": torch.rand(96, generator=rng) for i in range(3)}

    def additive(run, gates, masks, batch):
        costs = [sum(float(worth[n][off].sum()) for n, off in mask.items()) for mask in masks]
        return 0.01 * torch.tensor(costs)

    monkeypatch.setattr(bonsai, "log_perplexities", additive)
    out = prune(
        llama,
        tokens,
        share=0.1,
        of="units",
        kinds=["neurons"],
        rounds=1,
        masks=400,
        utility=utility,
    )
    for name, kept in out.kept.items():
        tried = out.scores[name] <= 0.5
        assert tried.sum() == 20
        dear = worth[name][tried & kept].sort()[0]
        assert (~kept).sum() == 10
        assert not (~kept & ~tried).any()
        assert worth[name][~kept].max() < dear[2]


def test_equal_worth_goes_by_the_prior():
    groups = [SimpleNamespace(name="a", units=4)]
    gates = bonsai.Gates.open(groups, torch.device("cpu"))
    gates.kept["a"][3] = False
    turns = {"a": bonsai.Turn(torch.tensor([1, 0]), 1.0, True)}
    scores = bonsai.ordered(gates, {"a": torch.tensor([0.3, 0.1, 0.5, 0.0])}, turns, torch.zeros(2))
    assert scores["a"].argsort().tolist() == [3, 1, 0, 2]


def planned(llama, ranking, counts, gone=0):
    groups = problem(llama).units(["heads", "neurons"])
    gates = bonsai.Gates.open(groups, torch.device("cpu"))
    gates.kept["neurons.0"][:gone] = False
    prior = {g.name: torch.arange(float(g.units)) for g in groups}
    now = Allocation({g.name: counts.get(g.name, 0) for g in groups}, ranking)
    return bonsai.planned(gates, prior, now, Sizes(llama, groups))


def test_twice_as_many_as_should_go_are_tried(llama):
    turns = planned(llama, "local", {"neurons.0": 7, "heads.1": 1, "neurons.2": 95}, gone=3)
    assert {name: (len(t.candidates), t.off) for name, t in turns.items()} == {
        "neurons.0": (8, 4),
        "heads.1": (1, 1),
        "neurons.2": (95, 48),
    }
    rng = torch.Generator().manual_seed(0)
    assert {name: t.counts(rng) for name, t in turns.items()} == {
        "neurons.0": (4, 4),
        "heads.1": (1, 0),
        "neurons.2": (48, 47),
    }
    assert turns["neurons.0"].candidates.tolist() == list(range(3, 11))


def test_where_all_compete_each_group_is_tried_by_its_share(llama):
    """A tenth of the parameters: a fifth of a group of two heads is one of them in every fifth
    mask.
    """
    counts = {f"neurons.{i}": 16 for i in range(3)}
    turns = planned(llama, "global", counts)
    groups = problem(llama).units(["heads", "neurons"])
    sizes = Sizes(llama, groups)
    share = sizes.removed(counts) / sizes.prunable()
    assert turns["neurons.1"].off == pytest.approx(96 * share)
    assert len(turns["neurons.1"].candidates) == 2 * math.ceil(96 * share)
    assert turns["heads.1"].off == pytest.approx(2 * share)
    rng = torch.Generator().manual_seed(0)
    prior = {g.name: torch.arange(float(g.units)) for g in groups}
    first = [bonsai.drawn(prior, turns, rng)[0] for _ in range(300)]
    assert sum(len(off["heads.1"]) for off in first) / 300 == pytest.approx(2 * share, abs=0.06)
    neurons = [len(off["neurons.1"]) for off in first]
    assert sum(neurons) / 300 == pytest.approx(96 * share, rel=0.1)
    assert min(neurons) == 0
    assert max(neurons) == 2 * math.ceil(96 * share)


def test_five_percent_go_in_a_round(llama, tokens):
    groups = problem(llama).units(["neurons"])
    assert bonsai.rounds_of(Sizes(llama, groups), {g.name: 19 for g in groups}) == 4
    out = prune(llama, tokens, share=0.2, of="units", kinds=["neurons"], rounds="auto", masks=10)
    assert len(out.notes["rounds"]) == math.ceil(20 / 96 / 0.05)


def test_excluded_blocks_stay_as_they_are(llama, tokens):
    before = copy.deepcopy(llama.model.layers[1].state_dict())
    prune(llama, tokens, exclude=lambda groups: [g for g in groups if g.layer != 1])
    assert all(torch.equal(v, before[k]) for k, v in llama.model.layers[1].state_dict().items())


def test_what_cannot_be_is_said_before_anything_is_loaded():
    mixtral = problem(tiny_model("mixtral", meta=True), ratio=uniform(0.2))
    with pytest.raises(ConfigError, match="none reads neurons.0"):
        check("bonsai", mixtral)
    llama = problem(tiny_model("llama", meta=True), ratio=uniform(0.01))
    with pytest.raises(ConfigError, match="2 units go in all"):
        check("bonsai", llama, rounds=3, kinds=["neurons"])
    with pytest.raises(ConfigError, match="multiple of 2"):
        pruners.build({"name": "bonsai", "masks": 11})
