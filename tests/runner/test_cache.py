"""The cache changes when numbers are computed, never what they are."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from fakes import config

from prunekit import graph, registry
from prunekit.activations.runs import ModelRun
from prunekit.architecture.compute import compute_in_float32
from prunekit.errors import ConfigError
from prunekit.profiling import Stages
from prunekit.registry import Component, Entry
from prunekit.runner import cache, provenance
from prunekit.runner.inputs import inputs
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


def asked(criterion, model, tokens, node, seed=0, counts=None, first=0):
    """Scores through a fresh cache object, and whether they came from disk."""
    view = cache.open_cache({"criterion": node, "seed": seed, "cache": True})
    groups = [g for g in graph.discover(model, verify=False) if g.kind == "neurons"][first:]
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
    assert not asked(criterion, tiny, tokens.view(2 * len(tokens), -1), node)[1]
    other = node | {"mode": "vectorize"}
    assert not asked(registry.criteria.build(other), tiny, tokens, other)[1]
    with torch.no_grad():
        next(tiny.parameters()).view(-1)[0] += 1
    assert not asked(criterion, tiny, tokens, node)[1]


def test_what_else_scores_depend_on_is_in_the_key(tiny, tokens, monkeypatch):
    node = {"name": "taylor"}
    criterion = registry.criteria.build(node)
    assert not asked(criterion, tiny, tokens, node)[1]
    assert not asked(criterion, tiny, tokens, node, seed=1)[1]
    assert not asked(criterion, tiny, tokens, node, first=1)[1]
    assert asked(criterion, tiny, tokens, node)[1]
    used = []
    monkeypatch.setattr(cache, "code_hash", lambda modules: used.append(modules) or "edited")
    assert not asked(criterion, tiny, tokens, node)[1]
    assert used == [["prunekit.criteria.taylor", "prunekit.runner.cache"]]


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


def test_times_and_memory_are_never_taken_from_the_cache():
    for name in ("latency", "memory"):
        assert registry.evals.entry(name).meta["cached"] is False


def test_a_changed_data_file_is_another_key(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one")
    before = cache.files_print({"name": "perplexity", "path": str(path)})
    path.write_text("another")
    assert cache.files_print({"name": "perplexity", "path": str(path)}) != before


def measured(folder_of_text, model, tokenizer, seed=0):
    """Whether the dense number came from disk."""
    node = {"name": "perplexity", "path": str(folder_of_text / "t.txt"), "window": 16, "limit": 2}
    view = cache.open_cache({"eval": {"ppl": node}, "seed": seed, "cache": True})
    view.measured("ppl", model, tokenizer, registry.evals.build(node))
    return bool(view.used)


def test_what_a_dense_number_depends_on_is_in_the_key(tmp_path, monkeypatch):
    model, tokenizer = registry.models.build({"name": "tiny_llama", "layers": 1})()
    (tmp_path / "t.txt").write_text("some words " * 99)
    assert not measured(tmp_path, model, tokenizer)
    assert measured(tmp_path, model, tokenizer)
    assert not measured(tmp_path, model, tokenizer, seed=1)
    (tmp_path / "t.txt").write_text("other words " * 99)
    assert not measured(tmp_path, model, tokenizer)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert not measured(tmp_path, model, tokenizer)
    tokenizer.add_tokens(["some"])
    assert not measured(tmp_path, model, tokenizer)
    assert measured(tmp_path, model, tokenizer)
    used = []
    monkeypatch.setattr(cache, "code_hash", lambda modules: used.append(modules) or "edited")
    assert not measured(tmp_path, model, tokenizer)
    assert used == [["prunekit.evals.perplexity", "prunekit.runner.cache"]]


def test_how_a_tokenizer_asks_is_in_its_hash():
    def hash_of(**changes):
        tokenizer = registry.models.build({"name": "tiny_llama", "layers": 1})()[1]
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        return cache.tokenizer_print(tokenizer)

    found = [
        hash_of(),
        hash_of(chat_template="{{ messages[0].content }}"),
        hash_of(chat_template="user: {{ messages[0].content }}"),
        hash_of(bos_token="</s>"),
    ]
    assert len(set(found)) == 4
    assert hash_of() == found[0]


def test_where_a_model_stops_is_in_its_hash(tiny):
    before = cache.model_print(tiny)
    tiny.generation_config.eos_token_id = [2, 7]
    assert cache.model_print(tiny) != before


def test_files_of_a_data_folder_are_in_the_key_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "t.txt"
    file.write_text("one")
    node = {"name": "perplexity", "dataset": "ptb", "data_root": "data"}
    before = cache.files_print(node)
    file.write_text("another")
    assert cache.files_print(node) != before


@pytest.mark.parametrize("package", ["transformers", "lm_eval"])
def test_versions_are_in_the_key(package, monkeypatch):
    before = cache.digest(["prunekit.runner.cache"])
    monkeypatch.setattr(cache.provenance, "version_of", lambda p: "0" if p == package else None)
    one = cache.digest(["prunekit.runner.cache"])
    monkeypatch.setattr(cache.provenance, "version_of", lambda p: "1" if p == package else None)
    assert len({before, one, cache.digest(["prunekit.runner.cache"])}) == 3
    monkeypatch.setattr(cache.platform, "python_version", lambda: "3.99")
    assert cache.digest(["prunekit.runner.cache"]) != one


@pytest.mark.parametrize(
    ("name", "other"),
    [("get_num_threads", 99), ("get_float32_matmul_precision", "medium")],
)
def test_what_the_bits_hang_on_is_in_the_key(name, other, monkeypatch):
    before = cache.digest(["prunekit.runner.cache"])
    monkeypatch.setattr(torch, name, lambda: other)
    assert cache.digest(["prunekit.runner.cache"]) != before


def test_half_precision_that_computes_in_float32_is_another_model(tiny):
    before = cache.model_print(tiny.bfloat16())
    compute_in_float32(tiny)
    assert cache.model_print(tiny) != before


@pytest.mark.parametrize("on", [True, False])
def test_what_is_kept_of_a_model_moves_no_generator(tiny, on):
    keep = cache.Cache({"seed": 3}, on).keeper(tiny, {})

    def draw():
        return {"drawn": torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])}

    def after(seed):
        provenance.seed_everything(seed)
        return draw()["drawn"].tolist()

    first, inside, outside = after(3), [], []
    for _ in range(2):  # a miss, then a hit or the same again
        provenance.seed_everything(5)
        inside.append(keep(cache.__name__, "draws", ["generators", on], draw)["drawn"].tolist())
        outside.append(draw()["drawn"].tolist())
    assert inside == [first, first]
    assert outside == [after(5), after(5)]


def test_what_is_kept_is_kept_for_rows_of_this_length(tiny, tokens):
    found = []
    for text in (tokens, tokens.view(2 * len(tokens), -1)):
        keep = cache.Cache({"seed": 0}, True).keeper(tiny, {"calibration": text})
        shape = torch.tensor(text.shape)
        kept = keep(cache.__name__, "shape", [], lambda shape=shape: {"shape": shape})
        found.append(kept["shape"].tolist() == shape.tolist())
    assert found == [True, True]


@pytest.mark.parametrize("text", ["x" * 300, "a/" * 3000, "~nobody-of-that-name/x", "a\0b"])
def test_a_text_that_can_be_no_path_names_no_file(text, monkeypatch):
    monkeypatch.delenv("PRUNEKIT_DATA", raising=False)
    assert cache.files_print({"text": text}) == []
    assert inputs(config(calib__glue=text)) == []


def test_a_run_without_a_home_keeps_nothing_and_says_so(monkeypatch, caplog):
    monkeypatch.setenv("PRUNEKIT_CACHE", "~nobody-of-that-name/cache")
    assert not cache.open_cache({"cache": False}).on
    assert not caplog.text
    assert not cache.open_cache({"cache": True}).on
    assert "nothing is kept; PRUNEKIT_CACHE=FOLDER names a place" in caplog.text


@pytest.mark.parametrize("given", ["much", "0", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_refused_before_the_run(given, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_CACHE_GIB", given)
    with pytest.raises(ConfigError, match=f"PRUNEKIT_CACHE_GIB={given}: .* above 0"):
        cache.open_cache({"cache": "on"})


def test_the_switch_is_checked():
    with pytest.raises(ConfigError, match="possible: on, off"):
        cache.open_cache({"cache": "perhaps"})
    assert not cache.open_cache({"cache": "off"}).on
