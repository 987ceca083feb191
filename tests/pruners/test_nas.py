"""Sub-networks on shared weights: what is cut out is what was measured, and what was searched."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cut_off import CutOff, Progress
from problems import problem, uniform
from tiny_models import tiny_model

from prunekit.activations.runs import ModelRun
from prunekit.errors import ConfigError
from prunekit.pruners.nas import held_out, loss, sandwich
from prunekit.registry import pruners
from prunekit.selection.prices import shape_key
from prunekit.selection.subnets import Subnets

TEXT = torch.randint(8, 100, (12, 16), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
"""The second half of each sample is its first half again."""
FAST = {"steps": 2, "batch": 4, "micro_batch": 1, "warmup_steps": 0, "lr": 1e-3, "samples": 12}


def ask(arch="llama", ratio=0.3):
    uniformly = uniform(ratio, "units")
    return problem(tiny_model(arch, layers=3), TEXT, ratio=uniformly, criterion={"name": "random"})


def run(asked, **over):
    return pruners.build({"name": "nas", **FAST, **over})(asked)


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
@pytest.mark.parametrize(
    "over",
    [
        {"space": "small", "r": 2},
        {"space": "medium", "r": 0},
        {"space": "large", "kinds": ["neurons"], "steps": 0},
        {"space": "small", "depth": True, "r": 2},
        {"space": "large", "kinds": ["blocks"], "r": 2},
    ],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()),
)
def test_what_is_cut_out_is_the_sub_network_that_was_measured(arch, over):
    of = ask(arch)
    dense = sum(p.numel() for p in of.model.parameters())
    pruned = run(of, **over)
    found = next(p for p in pruned.notes["front"] if p["params"] == pruned.notes["predicted"])
    aside = held_out(TEXT, 0.25)
    with torch.no_grad():
        assert loss(ModelRun(pruned.model, TEXT[-aside:])) == pytest.approx(found["loss"], abs=1e-4)
    assert sum(p.numel() for p in pruned.model.parameters()) == found["params"]
    assert found["params"] <= pruned.notes["budget"] < dense
    losses = [p["loss"] for p in pruned.notes["front"]]
    assert losses == sorted(losses, reverse=True)  # the smallest first


def test_what_sub_networks_are_compared_on_is_not_trained_on(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "prunekit.pruners.nas.train_supernet",
        lambda net, updates, examples, recipe, weight: seen.extend(examples),
    )
    run(ask(), r=0)
    assert [e["input_ids"] for e in seen] == TEXT[: -held_out(TEXT, 0.25)].tolist()


@pytest.mark.parametrize("of", ["macs", "kv_cache", "memory_mib"])
@pytest.mark.parametrize(
    "over", [{"space": "medium"}, {"space": "medium", "depth": True}, {"kinds": ["blocks"]}]
)
def test_the_cost_may_be_another_than_parameters(of, over):
    pruned = run(ask(ratio=0.5), of=of, steps=0, samples=40, **over)
    notes = pruned.notes
    costs = [p["cost"] for p in notes["front"]]
    assert costs == sorted(costs)
    assert notes["predicted"] in costs
    assert notes["predicted"] <= notes["budget"] < costs[-1]
    # of a block that goes norms go too, which no price counts
    assert notes["measured"] == pytest.approx(notes["predicted"], rel=0.01)


def test_milliseconds_are_measured_once_for_a_sweep(monkeypatch):
    kept, requests = {}, {"prompt": 4, "new_tokens": 1, "repeats": 1}

    def table(model, groups, asked):  # so small a model takes as long whatever is gone
        return {shape_key(model, g): {0: 2.0, g.units - 1: 1.0, g.units: 0.0} for g in groups}

    monkeypatch.setattr("prunekit.selection.latency.measured_table", table)
    monkeypatch.setattr("prunekit.selection.latency.total_ms", lambda model, asked: 20.0)

    def remember(module, name, parts, compute):
        if name not in kept:
            kept[name] = compute()
        return kept[name]

    def pruned(ratio):
        of = dataclasses.replace(ask(ratio=ratio), remember=remember)
        return run(of, of="latency_ms", request=requests, steps=0, samples=20).notes

    first, second = pruned(0.2), pruned(0.6)
    assert set(kept) == {"latency table", "search"}
    assert first["front"] == second["front"]
    assert second["predicted"] <= second["budget"] < first["budget"] < 20.0
    assert second["measured"] == 20.0


def test_the_whole_network_and_the_smallest_read_in_every_step():
    groups = ask().groups(["heads", "neurons"])
    space = Subnets(groups, "medium", {g.name: torch.arange(g.units) for g in groups}, 8)
    cycle = sandwich(space, 4, seed=3)
    left = [[int(mask.sum()) for mask in cycle(i).values()] for i in range(8)]
    assert left[0] == left[4] == [g.units for g in groups]
    assert left[1] == left[5] == [1] * len(groups)
    assert len({tuple(left[i]) for i in (2, 3, 6, 7)}) == 4


def test_nothing_changes_where_the_ratio_removes_nothing():
    of = ask(ratio=0.0)
    before = {n: t.clone() for n, t in of.model.state_dict().items()}
    pruned = run(of)
    assert all(torch.equal(before[n], t) for n, t in pruned.model.state_dict().items())


def chain(rows, length):
    """Each token follows from the one before."""
    found = [torch.randint(92, (rows,), generator=torch.Generator().manual_seed(1))]
    for _ in range(length - 1):
        found.append((3 * found[-1] + 7) % 92)
    return torch.stack(found, 1) + 8


def smallest_after():
    of = problem(
        tiny_model("llama", layers=3),
        chain(40, 16),
        ratio=uniform(0.3),
        criterion={"name": "random"},
    )
    more = {"steps": 40, "r": 0, "lr": 1e-2, "space": "small", "weight": 0.0}
    return run(of, **more).notes["front"][0]["loss"]


def test_the_sandwich_trains_the_smallest_network_better_than_the_whole_one_alone_does(monkeypatch):
    together = smallest_after()
    monkeypatch.setattr(
        "prunekit.pruners.nas.sandwich",
        lambda subnets, per_step, seed: lambda number: subnets.kept(subnets.whole),
    )
    alone = smallest_after()
    assert together < 0.8 * alone


@pytest.mark.parametrize("r", [0, 2])
def test_a_sweep_trains_and_searches_once(r, monkeypatch):
    kept = {}

    def remember(module, name, parts, compute):
        key = f"{name} {parts}"
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    def pruned(ratio):
        of = dataclasses.replace(ask(ratio=ratio), remember=remember)
        return run(of, r=r, samples=40)

    first = pruned(0.2)
    monkeypatch.setattr("prunekit.pruners.nas.train_supernet", None)
    again, smaller = pruned(0.2), pruned(0.5)
    assert len(kept) == 2
    assert smaller.notes["front"] == first.notes["front"]
    assert smaller.notes["predicted"] <= smaller.notes["budget"] < first.notes["budget"]
    state = first.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in again.model.state_dict().items())


@pytest.mark.parametrize("r", [0, 2])
def test_cut_off_it_goes_on_to_the_same_bits(r):
    how = {"steps": 5, "r": r, "save_every": 1}
    whole = run(ask(), **how)
    progress = Progress(2)
    with pytest.raises(CutOff):
        run(dataclasses.replace(ask(), training=progress), **how)
    again = run(dataclasses.replace(ask(), training=progress), **how)
    state = whole.model.state_dict()
    assert whole.notes == again.notes
    assert all(torch.equal(state[n], t) for n, t in again.model.state_dict().items())


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"batch": 4, "micro_batch": 2}, "at least three micro-batches"),
        ({"validation": 0.99}, "none is left to train on"),
        ({"targets": ["query"]}, r"targets=\['query'\] match no linear"),
    ],
)
def test_what_cannot_be_is_said(over, says):
    entry = pruners.entry("nas")
    with pytest.raises(ConfigError, match=says):
        entry.meta["check"](ask(), **entry.defaults | over)


def test_what_was_measured_of_other_blocks_is_not_taken():
    """The exclusion is no part of the cache's own key."""
    keys = []

    def remember(module, name, parts, compute):
        keys.append(f"{name} {parts}")
        return compute()

    for ends in ({"first": 1, "last": 0}, {"first": 0, "last": 1}):
        of = problem(
            tiny_model("llama", layers=4),
            TEXT,
            ratio=uniform(0.3, "units"),
            criterion={"name": "random"},
            exclude={"name": "ends", **ends},
        )
        run(dataclasses.replace(of, remember=remember), kinds=["blocks"], steps=0, samples=4)
    assert len(set(keys)) == len(keys) == 2
