"""Local solutions: what is assembled is what structured OBS gives, whole sub-layers go, and nothing
is solved twice.
"""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from fakes import config
from problems import check, part, problem
from tiny_models import logits, tiny_model

from prunekit import checkpoint, graph
from prunekit.errors import ConfigError
from prunekit.registry import pruners
from prunekit.runner.run import run
from prunekit.types import Allocation

OPTIONS = {"precision": "model", "levels": 4}


def ratio(**counts):
    """A ratio that takes so many units of the groups named (`neurons_1=24`)."""
    named = {name.replace("_", "."): n for name, n in counts.items()}
    return lambda problem, groups: Allocation({g.name: named.get(g.name, 0) for g in groups})


def prune(name, model, text, taken, **options):
    return pruners.build({"name": name, **options})(problem(model, text, ratio=taken))


def solutions(model, text, **options):
    """What a ratio is handed."""
    found = []

    def ask(asked, groups):
        found.append(asked.solutions)
        return Allocation({g.name: 0 for g in groups})

    prune("database", model, text, ask, **OPTIONS | options)
    return found[0]


@pytest.mark.parametrize(
    ("arch", "taken"),
    [
        ("llama", {"heads_1": 1}),
        ("gpt2", {"neurons_0": 24}),
        ("opt", {"neurons_1": 72}),
        ("phi3", {"neurons_1": 24}),
    ],
)
def test_a_level_is_what_obs_gives_there(text, arch, taken):
    """One sub-layer loses units, so that every block before it is the dense one in both."""
    model = tiny_model(arch)
    twin = copy.deepcopy(model)
    ours = prune("database", model, text, ratio(**taken), refit=False, **OPTIONS)
    theirs = prune("obs", twin, text, ratio(**taken), precision="model")
    assert ours.kept.keys() == theirs.kept.keys()
    assert all(torch.equal(ours.kept[name], theirs.kept[name]) for name in ours.kept)
    found, expected = model.state_dict(), twin.state_dict()
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-6), name


def test_levels_are_nested_and_errors_grow(text):
    for layer in solutions(tiny_model("llama"), text).sublayers:
        units = layer.group.units
        expected = (0, 24, 48, 72, 96) if layer.group.kind == "neurons" else (0, 1, 2)
        assert layer.removed == expected
        assert layer.removed[-1] == units
        assert layer.errors[0] == 0
        assert sorted(layer.errors) == list(layer.errors)
        costs = [layer.cost(n) for n in range(units + 1)]
        assert costs[0] == 0
        assert sorted(costs) == costs


def test_an_error_is_that_of_the_output(text):
    """Against the outputs themselves, tokens counted alike."""
    model = tiny_model("llama")
    found = solutions(model, text, token_weight="equal", bias=True)
    place = next(i for i, s in enumerate(found.sublayers) if s.group.name == "neurons.0")
    down, outputs = model.model.layers[0].mlp.down_proj, []
    hook = down.register_forward_hook(lambda *args: outputs.append(args[-1].detach().clone()))
    with found.assembled() as put:
        for level in range(5):
            put([level * (i == place) for i in range(len(found.sublayers))])
            logits(model, text)
    hook.remove()
    for level, output in enumerate(outputs):
        error = (output - outputs[0]).square().sum(-1).mean()
        assert found.sublayers[place].errors[level] == pytest.approx(float(error), rel=1e-3)


def test_an_assembled_model_is_the_pruned_one_and_goes_back(text):
    model = tiny_model("llama", layers=3)
    before, dense = copy.deepcopy(model.state_dict()), logits(model, text)
    found = solutions(model, text)
    choice = [1, 2, 0, 3, 2, 1]  # heads and neurons of each block; 2 are all heads
    counts = {s.group.name: s.removed[n] for s, n in zip(found.sublayers, choice)}
    with found.assembled() as put:
        put([0, 4, 1, 1, 1, 0])
        put(choice)
        seen = logits(model, text)
    assert set(model.state_dict()) == set(before)
    assert torch.equal(logits(model, text), dense)
    taken = ratio(**{name.replace(".", "_"): n for name, n in counts.items()})
    out = prune("database", model, text, taken, refit=False, **OPTIONS)
    assert not torch.allclose(seen, dense, atol=1e-2)
    assert torch.allclose(logits(out.model, text), seen, atol=1e-4)
    assert sum(p.numel() for p in model.model.layers[2].self_attn.parameters()) == 0
    assert not out.kept["heads.2"].any()


def test_refitted_it_is_obs(text):
    """Counts between levels, where no sub-layer goes as a whole."""
    model = tiny_model("llama", layers=3)
    twin = copy.deepcopy(model)
    taken = ratio(neurons_0=31, heads_1=1, neurons_2=50)
    prune("database", model, text, taken, **OPTIONS)
    prune("obs", twin, text, taken, precision="model")
    assert torch.equal(logits(model, text), logits(twin, text))


def test_without_a_refit_counts_go_down_to_a_level(text):
    out = prune("database", tiny_model("llama"), text, ratio(neurons_0=47), refit=False, **OPTIONS)
    assert out.notes["counts"]["neurons.0"] == 24


@pytest.mark.parametrize("refit", [True, False])
def test_whole_sublayers_go_and_the_checkpoint_loads(tmp_path, text, refit):
    model = tiny_model("llama", layers=3)
    taken = ratio(heads_0=2, neurons_1=96, neurons_2=24)
    out = prune("database", model, text, taken, refit=refit, **OPTIONS)
    assert sum(p.numel() for p in model.model.layers[0].self_attn.parameters()) == 0
    expected = logits(model, text)
    checkpoint.save(model, None, tmp_path / "c", kept=out.kept, groups=out.groups)
    again = checkpoint.load(tmp_path / "c")[0]
    assert torch.equal(logits(again, text), expected)
    with torch.no_grad():
        ids = text[:2, :8]
        cached, whole = (
            again.generate(ids, max_new_tokens=4, do_sample=False, use_cache=c, eos_token_id=None)
            for c in (True, False)
        )
    assert torch.equal(cached, whole)


def test_the_refit_sees_the_text_as_it_comes_without_a_sublayer_that_went(text):
    model = tiny_model("llama")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.o_proj.weight.zero_()
    prune("database", model, text, ratio(heads_0=2, neurons_1=24), **OPTIONS)
    prune("obs", twin, text, ratio(neurons_1=24), precision="model")
    assert torch.allclose(logits(model, text), logits(twin, text), atol=1e-5)


def test_sublayers_that_are_no_module_stay(text):
    """OPT's feed-forward is two modules of the block."""
    whole = {
        s.group.name: s.removed[-1] == s.group.units
        for s in solutions(tiny_model("opt"), text).sublayers
    }
    assert whole == {"heads.0": True, "neurons.0": False, "heads.1": True, "neurons.1": False}
    none = solutions(tiny_model("llama"), text, whole=False).sublayers
    assert all(s.removed[-1] < s.group.units for s in none)


@pytest.mark.parametrize("arch", ["gemma2", "gpt_neox", "falcon", "bloom"])
def test_a_module_stands_in_only_where_it_does_what_zeros_do(text, arch):
    """Norms after the sub-layer, sub-layers side by side, and one that adds the residual itself."""
    model = tiny_model(arch)
    found = solutions(model, text)
    for i, layer in enumerate(found.sublayers):
        if layer.removed[-1] < layer.group.units:
            continue
        with found.assembled() as put:
            put([(len(layer.removed) - 1) * (i == n) for n in range(len(found.sublayers))])
            seen = logits(model, text)
        pruned = copy.deepcopy(model)
        taken = ratio(**{layer.group.name.replace(".", "_"): layer.group.units})
        prune("database", pruned, text, taken, refit=False, **OPTIONS)
        assert torch.allclose(logits(pruned, text), seen, atol=1e-4)


def test_nothing_is_solved_where_nothing_goes(text, monkeypatch):
    from prunekit.solvers import local_solutions

    monkeypatch.setattr(local_solutions, "solve_levels", None)
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    assert prune("database", model, text, {"name": "uniform", "target": 0.0}).kept == {}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_run_that_was_cut_off_solves_what_is_missing(text, monkeypatch):
    from prunekit.solvers import local_solutions

    kept, solved = {}, []

    def remember(module, name, parts, compute):
        assert module == "prunekit.solvers.local_solutions"
        if name not in kept:
            solved.append(name)
            kept[name] = compute()
        return kept[name]

    def database(model):
        of = problem(model, text, ratio=ratio(neurons_0=48, heads_2=1))
        of = dataclasses.replace(of, remember=remember)
        return pruners.build({"name": "database", "refit": False, **OPTIONS})(of).model

    solve, times = local_solutions.solve_levels, []

    def limited(*args):
        times.append(1)
        if len(times) > 3:
            raise KeyboardInterrupt
        return solve(*args)

    monkeypatch.setattr(local_solutions, "solve_levels", limited)
    with pytest.raises(KeyboardInterrupt):
        database(tiny_model("llama", layers=3))
    assert list(kept) == ["solutions/heads.0", "solutions/neurons.0", "solutions/heads.1"]
    monkeypatch.setattr(local_solutions, "solve_levels", solve)
    model = database(tiny_model("llama", layers=3))
    assert solved[4:] == ["solutions/neurons.1", "solutions/heads.2", "solutions/neurons.2"]
    twin = prune("database", tiny_model("llama", layers=3), text, ratio(neurons_0=48, heads_2=1),
                 refit=False, **OPTIONS).model  # fmt: skip
    assert torch.equal(logits(model, text), logits(twin, text))


def test_another_ratio_takes_the_solutions_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    cfg = config(
        exclude={"name": "none"},
        criterion={"name": "none"},
        calib={"name": "crop", "samples": 4, "length": 32},
        pruner={"name": "database", "refit": False, **OPTIONS},
        eval={},
    ) | {"cache": "on"}
    records = []
    for name, target in (("a", 0.4), ("b", 0.3), ("c", 0.3)):
        cfg["ratio"] = {"name": "uniform", "target": target}
        run(cfg | ({"cache": "off"} if name == "c" else {}), tmp_path / name)
        records.append(json.loads((tmp_path / name / "result.json").read_text()))
    used = [{n for n in r["cached"] if n.startswith("solutions/")} for r in records]
    assert not used[0]
    assert used[1] == {f"solutions/{kind}.{i}" for kind in ("heads", "neurons") for i in range(4)}
    assert not used[2]
    assert records[1]["kept"] == records[2]["kept"] != records[0]["kept"]


def test_shapes_tell_the_size_on_disk():
    model = tiny_model("llama", meta=True)
    asked = problem(model, ratio={"name": "uniform", "target": 0.2})
    expected = check("database", asked, levels=4)
    assert "MiB in memory, or with pruner.store=disk on disk" in expected.remark
    assert sum(expected.counts.values()) > 0
    with pytest.raises(ConfigError, match="have none"):
        check(
            "database",
            problem(tiny_model("mixtral", meta=True), ratio=part("ratio", {"name": "uniform"})),
        )


def test_a_sublayer_that_must_stay_cannot_lose_all_its_units(text):
    with pytest.raises(ConfigError, match="neurons.1 cannot lose all"):
        prune("database", tiny_model("opt"), text, ratio(neurons_1=96), **OPTIONS)


def test_one_sample_cannot_judge_itself(text):
    with pytest.raises(ConfigError, match="there is one sample"):
        prune("database", tiny_model("llama"), text.view(1, -1), ratio(neurons_0=24))


def test_zeroed_units_are_those_that_are_cut_out(text):
    """The mask names what is zero: removing it moves nothing."""
    model = tiny_model("llama")
    found = solutions(model, text)
    kept = found.put_in({"neurons.0": 48})
    before = logits(model, text)
    graph.remove(model, kept)
    assert torch.allclose(logits(model, text), before, atol=1e-4)
