"""Sparsities chosen among local solutions: a level is what SparseGPT gives there, the choice is
pruned as SparseGPT prunes it, and counts are exact.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from fakes import config
from problems import check, problem, uniform
from tiny_models import logits, tiny_model

from prunekit.activations.gram import grams
from prunekit.architecture.mapped import is_mapped
from prunekit.architecture.matrices import matrices, matrix
from prunekit.architecture.offload import map_weights
from prunekit.errors import ConfigError
from prunekit.problem import computed
from prunekit.registry import pruners
from prunekit.runner.run import run
from prunekit.selection.elements import floor_share
from prunekit.solvers import sparse_levels
from prunekit.solvers.level_database import SMALL
from prunekit.types import Allocation

LEVELS = [0.0, 0.25, 0.5, 0.75]
SEARCH = {"generations": 2, "offspring": 4, "tokens": [32, 64], "window": 32}


def prune(model, text, ratio, remember=computed, **options):
    pruner = pruners.build({"name": "sparse_database", "levels": LEVELS, **options})
    return pruner(dataclasses.replace(problem(model, text, ratio=ratio), remember=remember))


def sparsegpt(model, text, ratio, **options):
    return pruners.build({"name": "sparsegpt", **options})(problem(model, text, ratio=ratio))


def searched(name="milp", target=0.6, of="prunable"):
    return {"name": name, "target": target, "of": of} | (SEARCH if name == "evolution" else {})


def taken(share_of):
    """A ratio that takes a share of each matrix, by its group."""
    return lambda problem, groups: Allocation(
        {g.name: floor_share(g.units, share_of(g)) for g in groups}
    )


def solutions(model, text, **options):
    """What a ratio is handed."""
    found = []

    def ask(asked, groups):
        found.append(asked.solutions)
        return Allocation({g.name: 0 for g in groups})

    prune(model, text, ask, **options)
    return found[0]


def zeros(model, groups):
    return {g.name: int((matrix(model, g) == 0).sum()) for g in groups}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_level_is_sparsegpts_own_result(text, arch):
    """On the same gram bit for bit: in the first block, whose inputs no pruning changes."""
    for share in LEVELS[1:]:
        model = tiny_model(arch)
        twin = copy.deepcopy(model)
        first = taken(lambda g, share=share: share if g.layer == 0 else 0)
        ours = prune(model, text, first, refit=False, block=16)
        theirs = sparsegpt(twin, text, first, block=16)
        assert ours.kept.keys() == theirs.kept.keys()
        for name, kept in theirs.kept.items():
            assert torch.equal(ours.kept[name], kept), name
        found, expected = model.state_dict(), twin.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert ours.notes["counts"] == theirs.notes["counts"] | {
            g.name: 0 for g in ours.groups if g.layer
        }


def test_later_blocks_are_solved_on_what_the_dense_ones_put_out(text):
    model = tiny_model("llama", layers=3)
    twin = copy.deepcopy(model)
    prune(model, text, taken(lambda g: 0.5), refit=False)
    last = taken(lambda g: 0.5 if g.layer == 2 else 0)
    sparsegpt(twin, text, last)
    for g in matrices(twin):
        if g.layer == 2:
            assert torch.equal(matrix(model, g), matrix(twin, g)), g.name


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_equal_levels_refitted_are_sparsegpt(text, arch):
    model = tiny_model(arch, layers=3)
    twin = copy.deepcopy(model)
    out = prune(model, text, uniform(0.5))
    expected = sparsegpt(twin, text, uniform(0.5))
    found = model.state_dict()
    assert all(torch.equal(found[k], v) for k, v in twin.state_dict().items())
    assert out.notes["costs"] == expected.notes["costs"]


def test_a_ratio_that_knows_no_levels_solves_nothing(text, monkeypatch):
    monkeypatch.setattr(sparse_levels, "solve_sparsities", None)
    model = tiny_model("llama")
    twin = copy.deepcopy(model)
    owl = {"name": "owl", "target": 0.6, "M": 2}
    assert prune(model, text, owl).notes["counts"] == sparsegpt(twin, text, owl).notes["counts"]
    assert torch.equal(logits(model, text), logits(twin, text))


@pytest.mark.parametrize("name", ["uniform", "milp", "evolution"])
@pytest.mark.parametrize("refit", [True, False])
def test_nothing_changes_where_nothing_goes(text, monkeypatch, name, refit):
    if name == "uniform":  # it asks for no solutions
        monkeypatch.setattr(sparse_levels, "solve_sparsities", None)
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    out = prune(model, text, searched(name, 0.0), refit=refit)
    assert out.kept == {}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("target", [0.6, 0.123, 0.75])
def test_counts_are_exact(text, arch, target):
    model = tiny_model(arch)
    out = prune(model, text, searched("milp", target))
    every = sum(g.units for g in out.groups)
    gone = zeros(model, out.groups)
    assert gone == dict.fromkeys(gone, 0) | out.notes["counts"]
    assert sum(gone.values()) == floor_share(every, target)
    told = out.notes["budget"]
    assert told["dense"] == every
    assert told["predicted"] == told["measured"] == every - floor_share(every, target)


def test_of_all_parameters_zeros_count_too(text):
    model = tiny_model("llama")
    every = sum(p.numel() for p in model.parameters())
    out = prune(model, text, searched("milp", 0.2, "model"))
    assert sum(zeros(model, out.groups).values()) == floor_share(every, 0.2)
    told = out.notes["budget"]
    assert told["measured"] == told["predicted"] == told["dense"] - floor_share(every, 0.2)


def test_without_a_refit_what_lies_in_the_database_is_taken(text):
    """A step of the smallest matrix at most is missing then."""
    model = tiny_model("llama")
    out = prune(model, text, searched("milp"), refit=False)
    levels, counts = out.notes["levels"], out.notes["counts"]
    assert all(counts[name] >= levels[name] for name in levels)
    assert zeros(model, out.groups) == counts
    every, smallest = sum(g.units for g in out.groups), min(g.units for g in out.groups)
    lacking = floor_share(every, 0.6) - sum(counts.values())
    assert 0 <= lacking < 0.25 * smallest


def test_an_error_is_that_of_the_output_relative_to_it(text):
    model = tiny_model("llama")
    found = solutions(model, text)
    place = next(
        i for i, s in enumerate(found.sublayers) if s.group.name == "weights.0.mlp.up_proj"
    )
    up, outputs = model.model.layers[0].mlp.up_proj, []
    hook = up.register_forward_hook(lambda *args: outputs.append(args[-1].detach().double()))
    with found.assembled() as put:
        for level in range(4):
            put([level * (i == place) for i in range(len(found.sublayers))])
            logits(model, text)
    hook.remove()
    for level, output in enumerate(outputs):
        error = (output - outputs[0]).square().sum() / outputs[0].square().sum()
        assert found.sublayers[place].errors[level] == pytest.approx(float(error), rel=1e-3)
    costs = [found.sublayers[place].cost(n) for n in found.sublayers[place].removed]
    assert costs == list(found.sublayers[place].errors)


def test_an_assembled_model_is_the_pruned_one_and_goes_back(text):
    model = tiny_model("llama")
    dense = logits(model, text)
    found = solutions(model, text)
    choice = [i % 4 for i in range(len(found.sublayers))]
    with found.assembled() as put:
        put([3] * len(choice))
        put(choice)
        seen = logits(model, text)
    assert torch.equal(logits(model, text), dense)
    share = {s.group.name: LEVELS[n] for s, n in zip(found.sublayers, choice, strict=True)}
    prune(model, text, taken(lambda g: share[g.name]), refit=False)
    assert torch.equal(logits(model, text), seen)


def test_the_programme_is_the_optimum_of_brute_force(text):
    """Of all choices that save the budget but for less than the smallest step."""
    model = tiny_model("llama", layers=1)
    levels = [0.0, 0.5, 0.75]
    found = solutions(model, text, levels=levels).sublayers
    every, step = sum(s.group.units for s in found), min(s.removed[1] for s in found)
    budget = floor_share(every, 0.6)
    best = min(
        sum(s.errors[n] for s, n in zip(found, choice, strict=True))
        for choice in itertools.product(range(3), repeat=len(found))
        if 0 <= budget - sum(s.removed[n] for s, n in zip(found, choice, strict=True)) < step
    )
    out = prune(model, text, searched("milp", 0.6), levels=levels)
    assert out.notes["local_error"] == pytest.approx(best)


def test_one_factor_serves_all_levels_of_all_that_read_the_input(text, monkeypatch):
    factor, asked = sparse_levels.inverse_factor, []

    def counted(gram, ridge, name):
        asked.append(name)
        return factor(gram, ridge, name)

    monkeypatch.setattr(sparse_levels, "inverse_factor", counted)
    assert len(solutions(tiny_model("llama"), text).sublayers) == 14
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert asked == [f"weights.{b}.{part}" for b in (0, 1) for part in parts]


def test_a_run_that_was_cut_off_goes_on_with_what_is_missing(text, monkeypatch):
    """Solutions, and then what the search measured."""
    kept, solved = {}, []

    def remember(module, name, parts, compute):
        key = (module, name, repr(parts))
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    solve, stop = sparse_levels.solve_sparsities, [5]

    def limited(*args):
        if len(solved) == stop[0]:
            raise KeyboardInterrupt
        solved.append(1)
        return solve(*args)

    monkeypatch.setattr(sparse_levels, "solve_sparsities", limited)
    evolution = searched("evolution")
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_model("llama"), text, evolution, remember)
    assert len(kept) == 5
    stop[0] = -1
    whole = prune(tiny_model("llama"), text, evolution, remember)
    assert len(solved) == 14
    measured = [key for key in kept if key[1] == "fitness"]
    for key in measured[len(measured) // 2 :]:
        del kept[key]
    again = prune(tiny_model("llama"), text, evolution, remember)
    assert len(solved) == 14
    assert [key for key in kept if key[1] == "fitness"] == measured
    assert again.notes["trace"] == whole.notes["trace"]
    assert torch.equal(logits(again.model, text), logits(whole.model, text))
    alone = prune(tiny_model("llama"), text, evolution)
    assert torch.equal(logits(alone.model, text), logits(whole.model, text))


def test_another_ratio_takes_the_solutions_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    cfg = config(
        exclude={"name": "none"},
        criterion={"name": "none"},
        calib={"name": "crop", "samples": 4, "length": 32},
        pruner={"name": "sparse_database", "levels": LEVELS},
        eval={},
    ) | {"cache": "on"}
    records = []
    for target in (0.6, 0.5):
        run(cfg | {"ratio": searched("milp", target)}, tmp_path / str(target))
        records.append(json.loads((tmp_path / str(target) / "result.json").read_text()))
    used = [{n for n in r["cached"] if n.startswith("solutions/")} for r in records]
    assert not used[0]
    assert len(used[1]) == 4 * 7


def test_shapes_tell_the_size_on_disk(text):
    model = tiny_model("llama", meta=True, hidden=128, ffn=256)
    expected = check("sparse_database", problem(model, ratio=searched()), levels=LEVELS)
    assert expected.counts is None
    assert not expected.smaller
    found = solutions(tiny_model("llama", hidden=128, ffn=256), text)
    found.solve()
    stored = sum(t.nbytes for s in found.solved.values() for t in s.values())
    assert found.bytes() == pytest.approx(stored, rel=0.02)
    size = f"together take {found.bytes() / 2**20:,.1f} MiB"
    assert f"{size} in memory" in expected.remark
    assert "cache" not in expected.remark


def test_a_database_larger_than_the_cache_is_told(monkeypatch):
    monkeypatch.setenv("PRUNEKIT_CACHE_GIB", "0.00001")
    asked = problem(tiny_model("llama", meta=True), ratio=searched())
    said = check("sparse_database", asked, levels=LEVELS, store="disk").remark
    assert "MiB on disk. The cache keeps the last 1e-05 GiB of them" in said


@pytest.mark.parametrize("how", ["store", "weights"])
def test_solutions_may_wait_in_files(text, how):
    """To the bit what they are in memory; all but the smallest, where that is asked for or the
    weights are in files.
    """
    here, there = (tiny_model("llama", hidden=128, ffn=1024) for _ in range(2))
    options = {"store": "disk"} if how == "store" else {}
    if how == "weights":
        map_weights(there)
    found = solutions(there, text, **options)
    found.solve()
    parts = [part for s in found.solved.values() for part in s.values()]
    parts += [found.aside(g) for _, g in found.places]
    assert {is_mapped(p) for p in parts if p.nbytes > SMALL} == {True}
    prune(here, text, searched("evolution"), refit=False)
    prune(there, text, searched("evolution"), refit=False, **options)
    assert torch.equal(logits(here, text), logits(there, text))


@pytest.mark.parametrize("of", ["memory_mib", "macs", "kv_cache", "latency_ms"])
def test_a_budget_of_which_zeros_save_nothing_is_refused_on_shapes(of):
    asked = problem(tiny_model("llama", meta=True), ratio=searched(of=of))
    with pytest.raises(ConfigError, match=f"ratio.of={of}: .*; possible: model, prunable"):
        check("sparse_database", asked)


def test_what_cannot_be_is_said_on_shapes():
    meta = tiny_model("llama", meta=True)
    with pytest.raises(ConfigError, match="75.0% of it can go.*higher pruner.levels"):
        check("sparse_database", problem(meta, ratio=searched(target=0.8)), levels=LEVELS)
    with pytest.raises(ConfigError, match="see.* one matrix at a time"):
        check("sparse_database", problem(meta, ratio=uniform(0.5, "units", ranking="global")))
    high = problem(meta, ratio=uniform(0.8))
    with pytest.raises(ConfigError, match="refit=false.* lacks 0.75 of a matrix.* takes 0.8 of"):
        check("sparse_database", high, levels=LEVELS, refit=False)
    for levels in ([0.5, 0.7], [0.0, 0.7, 0.5], [0.0, 0.5, 0.5]):
        with pytest.raises(ConfigError, match="must begin with 0 and grow"):
            pruners.build({"name": "sparse_database", "levels": levels})
    for levels in ([0.0], [0.0, 1.0]):
        with pytest.raises(ConfigError, match="levels"):
            pruners.build({"name": "sparse_database", "levels": levels})


def test_a_ratio_known_by_weights_alone_is_refused_above_the_highest_level(text):
    owl = {"name": "owl", "target": 0.8, "lamda": 0.0}
    with pytest.raises(ConfigError, match="pruner.refit=false"):
        prune(tiny_model("llama"), text, owl, refit=False)


def test_the_gram_is_that_of_the_dense_model(text):
    model = tiny_model("llama")
    found = solutions(model, text)
    found.solve()
    asked = problem(model, text)
    for alike, gram in grams(model, [g for g in matrices(model) if g.layer == 1], asked.run()):
        for g in alike:
            torch.testing.assert_close(found.inputs[g.name].gram, gram)
