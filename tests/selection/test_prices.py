"""What a budget's unit says will be saved is what a pruned model saves."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from problems import problem
from tiny_models import tiny_model

from prunekit import graph
from prunekit.checkpoint.remote_code.runtime_modules import Bypass, insert
from prunekit.errors import ConfigError
from prunekit.selection import latency
from prunekit.selection.budgets import prices_of
from prunekit.selection.prices import REQUEST, kv_prices

TEXT = torch.randint(8, 100, (4, 16), generator=torch.Generator().manual_seed(0))
COUNTS = {"heads.0": 1, "neurons.0": 31, "neurons.1": 60}


def prices(model, of):
    asked = problem(model, TEXT)
    groups = asked.units(["heads", "neurons"])
    return prices_of(asked.model, groups, of, REQUEST, asked.remember)


def pruned(model, counts):
    small = copy.deepcopy(model)
    units = {g.name: g.units for g in problem(model).units(["heads", "neurons"])}
    graph.remove(small, {name: torch.arange(units[name]) >= n for name, n in counts.items()})
    return small


@pytest.mark.parametrize("of", ["model", "prunable", "memory_mib", "macs", "kv_cache"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_what_is_predicted_is_measured(arch, of):
    model = tiny_model(arch)
    found = prices(model, of)
    assert found.measure(model) == pytest.approx(found.dense)
    small = pruned(model, COUNTS)
    assert found.measure(small) == pytest.approx(found.dense - found.saved(COUNTS), rel=1e-6)
    assert found.saved(COUNTS) > 0
    assert found.saved(dict.fromkeys(COUNTS, 0)) == 0


@pytest.mark.parametrize("of", ["model", "memory_mib", "macs", "kv_cache"])
def test_a_sublayer_that_is_gone_saves_all_of_its_units(of):
    model = tiny_model("llama")
    found = prices(model, of)
    insert(model, "model.layers.0.self_attn", Bypass(2))
    assert found.measure(model) == pytest.approx(found.dense - found.saved({"heads.0": 2}))


def test_only_heads_shorten_the_cache():
    model = tiny_model("llama")
    found = prices(model, "kv_cache")
    assert found.saved({"neurons.0": 96}) == 0
    tokens = REQUEST["prompt"] + REQUEST["new_tokens"]
    assert found.dense == pytest.approx(2 * 2 * 2 * 20 * 4 * tokens / 2**20)  # layers, k and v
    heads = problem(model).units(["heads"])
    with pytest.raises(ConfigError, match="does not shrink"):
        kv_prices(model, [dataclasses.replace(heads[0], units=3)], REQUEST)


def times(model, modules, asked):
    """Two milliseconds and a tenth for every channel that the reader reads."""
    out = {}
    for name, (path,) in modules.items():
        module = model.get_submodule(path)
        reader = module.down_proj if name.startswith("neurons") else module.o_proj
        out[name] = 2 + reader.in_features / 10
    return out


def test_times_between_widths_are_interpolated(monkeypatch):
    monkeypatch.setattr(latency, "times_of", times)
    monkeypatch.setattr(latency, "total_ms", lambda model, asked: 100.0)
    model = tiny_model("llama", layers=3)
    before = copy.deepcopy(model.state_dict())
    found = prices(model, "latency_ms")
    assert found.dense == 100
    for removed in (0, 7, 19, 50, 95):
        assert found.saves["neurons.1"](removed) == pytest.approx(removed / 10)
    assert found.saves["neurons.1"](96) == pytest.approx(2 + 9.6), "gone, it takes no time"
    assert found.saves["heads.2"](1) == pytest.approx(4.0)
    assert set(before) == set(model.state_dict())


def test_a_wider_sublayer_is_never_quicker():
    saves = latency.interpolated({0: 5.0, 10: 6.0, 20: 3.0, 30: 0.0})
    assert [saves(n) for n in (0, 10, 15, 20, 25, 30)] == [0, 0, 1, 2, 3.5, 5]


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_the_table_is_measured_once(arch, monkeypatch):
    """OPT's feed-forward is two modules of the block: both count."""
    kept = {}

    def remember(module, name, parts, compute):
        if (name, repr(parts)) not in kept:
            kept[name, repr(parts)] = compute()
        return kept[name, repr(parts)]

    model = tiny_model(arch, layers=4)
    asked = {"batch": 1, "prompt": 4, "new_tokens": 1, "repeats": 1}
    groups = problem(model).units(["heads", "neurons"])
    first, again = (latency.latency_prices(model, groups, asked, remember) for _ in range(2))
    assert len(kept) == 1
    assert first.dense == again.dense > 0
    for g in groups:
        curve = [first.saves[g.name](n) for n in range(g.units + 1)]
        assert curve == sorted(curve)
        assert curve[0] == 0 < curve[-1]
        assert curve == [again.saves[g.name](n) for n in range(g.units + 1)]
    longer = latency.latency_prices(model, groups, asked | {"prompt": 5}, remember)
    assert len(kept) == 2
    assert longer.measure(model) > 0
    monkeypatch.setattr(latency, "processor", lambda: "another one")
    latency.latency_prices(model, groups, asked, remember)
    assert len(kept) == 3
    modules = latency.timed_modules(model, groups)
    last = "model.decoder.layers.0.fc2" if arch == "opt" else "model.layers.0.mlp"
    assert modules["neurons.0"][-1] == last


@pytest.mark.parametrize("arch", ["mistral", "gemma2"])  # a window in every layer, in every other
def test_a_sliding_window_holds_no_more_than_itself(arch):
    model = tiny_model(arch, sliding_window=32)
    groups = problem(model).units(["heads"])
    found = kv_prices(model, groups, {"batch": 2, "prompt": 40, "new_tokens": 10})
    cache = model(input_ids=torch.ones(2, 50, dtype=torch.long), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for k in cache.layers for t in (k.keys, k.values))
    assert found.dense == pytest.approx(held / 2**20)
    whole = {g.name: g.units for g in groups}
    assert found.saved(whole) == pytest.approx(found.dense)
