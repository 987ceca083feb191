"""The cache changes when numbers are computed, never what they are."""

from __future__ import annotations

import json
import multiprocessing
import os
import time

import pytest
import torch
from fakes import config

from prunekit import graph, registry
from prunekit.activations.runs import ModelRun
from prunekit.errors import ConfigError
from prunekit.profiling import Stages
from prunekit.registry import Component, Entry
from prunekit.runner import cache
from prunekit.runner.run import run


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "results"


def cfg(**changes):
    quick = {"size": {"name": "size"}, "ppl": {"name": "perplexity", "window": 32, "limit": 4}}
    base = {
        "exclude": {"name": "none"},
        "calib": {"name": "crop", "samples": 4, "length": 32},
        "eval": quick,
    }
    return config(**(base | changes)) | {"objective": None}


def numbers(record):
    return record["results"], record["importance"], record["kept"]


@pytest.mark.parametrize("criterion", [{"name": "taylor"}, {"name": "random"}, {"name": "l2"}])
def test_cached_and_uncached_runs_give_the_same_bits(tmp_path, criterion):
    first = run(cfg(criterion=criterion) | {"cache": "on"}, tmp_path / "a")
    second = run(cfg(criterion=criterion) | {"cache": "on"}, tmp_path / "b")
    without = run(cfg(criterion=criterion) | {"cache": "off"}, tmp_path / "c")
    assert numbers(first) == numbers(second) == numbers(without)


def test_another_ratio_scores_nothing_anew(tmp_path):
    run(cfg(ratio__target=0.1), tmp_path / "a")
    from_cache = run(cfg(ratio__target=0.3), tmp_path / "b")
    anew = run(cfg(ratio__target=0.3) | {"cache": "off"}, tmp_path / "c")
    used = json.loads((tmp_path / "b" / "result.json").read_text())["cached"]
    assert set(used) == {"dense/size", "dense/ppl", "score"}
    assert numbers(from_cache) == numbers(anew)


def asked(criterion, model, tokens, node, seed=0, counts=None):
    """Scores through a fresh cache object, and whether they came from disk."""
    view = cache.open_cache({"criterion": node, "seed": seed, "cache": True})
    groups = [g for g in graph.discover(model, verify=False) if g.kind == "neurons"]
    scores = view.scores(criterion, Stages())(model, groups, ModelRun(model, tokens, counts))
    return scores, bool(view.used)


@pytest.fixture
def tiny():
    return registry.models.build({"name": "tiny_llama", "layers": 2})()[0]


def test_what_scores_depend_on_is_in_the_key(tiny, tokens):
    node = {"name": "taylor", "mode": "param_first"}
    criterion = registry.criteria.build(node)
    assert not asked(criterion, tiny, tokens, node)[1]
    assert asked(criterion, tiny, tokens, node)[1]
    assert not asked(criterion, tiny, tokens[:2], node)[1]
    other = node | {"mode": "vectorize"}
    assert not asked(registry.criteria.build(other), tiny, tokens, other)[1]
    with torch.no_grad():
        next(tiny.parameters()).view(-1)[0] += 1
    assert not asked(criterion, tiny, tokens, node)[1]


def registered(fn, module="prunekit.criteria.taylor", **meta):
    """`fn` as a criterion that a file of prunekit has registered."""
    fn.__module__ = module
    return Component(Entry(fn.__name__, fn, {}, {}, meta), {})


def test_a_criterion_that_asks_for_the_counts_is_not_stored(tiny, tokens):
    def nosy(model, groups, run):
        assert run.counts == {}
        return {g.name: torch.zeros(g.units) for g in groups}

    for _ in range(2):
        counting = registered(nosy, uses_counts=True)
        assert not asked(counting, tiny, tokens, {"name": "nosy"}, counts={})[1]
    with pytest.raises(RuntimeError, match="uses_counts"):
        asked(registered(nosy), tiny, tokens, {"name": "nosy"})


def test_what_a_criterion_of_ones_own_does_nobody_can_hash(tiny, tokens):
    def own(model, groups, run):
        return {g.name: torch.zeros(g.units) for g in groups}

    for _ in range(2):
        assert not asked(registered(own, module="somewhere.else"), tiny, tokens, {"name": "own"})[1]


def test_scores_keep_their_order_and_their_bits(tmp_path):
    scores = {"b": torch.randn(5), "a": torch.tensor([1.0, float("inf")])}
    cache.write_scores(tmp_path / "x.safetensors", scores)
    read = cache.read_scores(tmp_path / "x.safetensors")
    assert set(read) == set(scores)
    assert all(torch.equal(read[n], scores[n]) for n in scores)


def test_times_and_memory_are_never_taken_from_the_cache():
    for name in ("latency", "memory"):
        assert registry.evals.entry(name).meta["cached"] is False


def test_the_store_is_bounded_and_drops_what_was_unused_for_longest(tmp_path):
    for i in range(4):
        path = tmp_path / f"{i}.json"
        path.write_text("x" * 100)
        os.utime(path, (i, i))
    cache.keep_within(tmp_path, 250)
    assert {p.name for p in tmp_path.iterdir()} == {"2.json", "3.json"}


def test_a_changed_data_file_is_another_key(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one")
    before = cache.files_print({"name": "perplexity", "path": str(path)})
    path.write_text("another")
    assert cache.files_print({"name": "perplexity", "path": str(path)}) != before


def _remember(folder: str) -> bool:
    os.environ["PRUNEKIT_CACHE"] = folder
    view = cache.open_cache({"cache": True, "seed": 0})

    def slow():
        time.sleep(0.5)
        return {"x": float(os.getpid())}

    view.remember(cache.Entry("dense/k.json", "k", cache.read_numbers, cache.write_numbers), slow)
    return bool(view.used)


def test_processes_that_want_the_same_compute_it_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        used = pool.map(_remember, [str(tmp_path)] * 2)
    assert sorted(used) == [False, True]


def test_the_switch_is_checked():
    with pytest.raises(ConfigError, match="possible: on, off"):
        cache.open_cache({"cache": "perhaps"})
    assert not cache.open_cache({"cache": "off"}).on
