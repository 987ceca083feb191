"""Texts in turn: masks from all that was seen, weights that return, and what the notes say."""

from __future__ import annotations

import math

import pytest
import torch
from compositions import config
from problems import check, problem, uniform
from tiny_models import tiny_model

from prunekit.architecture.matrices import matrix
from prunekit.errors import ConfigError
from prunekit.models.tiny import tiny_llama
from prunekit.problem import Problem, named_sets
from prunekit.pruners.copal import report
from prunekit.registry import calibs, pruners, ratios
from prunekit.runner.preflight import build_components
from prunekit.runner.run import run
from prunekit.scoring.copal import sensitivity
from prunekit.selection.elements import per_row


def texts(samples: int = 8, length: int = 24) -> dict[str, torch.Tensor]:
    """Three languages: tokens of different thirds of the vocabulary."""
    g = torch.Generator().manual_seed(0)
    return {
        n: torch.randint(8 + 30 * i, 38 + 30 * i, (samples, length), generator=g)
        for i, n in enumerate("abc")
    }


def prune(model, sets, **options):
    ratio = ratios.build(uniform(0.5))
    asked = Problem(model, None, named_sets(sets), None, ratio)
    return pruners.build({"name": "copal", "held_out": 2, **options})(asked)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2_moe"])
def test_half_of_every_row_goes_and_masks_follow_the_texts(name):
    model = tiny_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pruned = prune(model, texts())
    for g in pruned.groups:
        W = matrix(model, g)
        assert set((W == 0).sum(1).tolist()) == {W.shape[1] // 2}
        weight = model.get_parameter(g.matrix)
        dense = before[g.matrix]
        assert torch.equal(weight, dense * pruned.kept[g.name])  # those that returned are whole
    told = pruned.notes["continual"]
    assert told["texts"] == ["a", "b", "c"]
    assert [s["changed"] > 0 for s in told["copal"]["steps"]] == [False, True, True]
    assert [s["changed"] for s in told["stasis"]["steps"]] == [0, 0, 0]


def test_one_step_is_the_one_shot_mask_of_the_sum():
    """The last masks of the first block are those of the sum of all sensitivities."""
    sets = texts()
    model, dense = tiny_model("llama"), tiny_model("llama")
    pruned = prune(model, sets)
    g = next(g for g in pruned.groups if "q_proj" in g.name and g.layer == 0)
    W = matrix(dense, g).detach()
    total = torch.zeros_like(W)
    for tokens in sets.values():
        seen = []
        module = dense.get_submodule("model.layers.0.self_attn.q_proj")
        hook = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            dense(tokens[:-2])
        hook.remove()
        x = seen[0].flatten(0, 1)
        total += sensitivity(W, x.T @ x / len(x))
    assert torch.equal(pruned.kept[g.name], per_row(total, g.units // 2))


def test_perplexities_are_those_of_the_samples_held_out():
    sets = texts()
    model = tiny_model("llama")
    dense = prune(model, sets, held_out=3).notes["continual"]
    fresh = tiny_model("llama")
    for name, tokens in sets.items():
        with torch.no_grad():
            loss = fresh(tokens[-3:], labels=tokens[-3:]).loss
            after = model(tokens[-3:], labels=tokens[-3:]).loss
        assert dense["dense"][name] == pytest.approx(math.exp(loss), rel=1e-4)
        assert dense["copal"]["steps"][-1][name] == pytest.approx(math.exp(after), rel=1e-4)


def test_the_report_is_the_mean_at_the_end_and_the_rise_since_each_text_s_turn():
    steps = [{"a": 10.0, "b": 50.0}, {"a": 13.0, "b": 20.0}]
    assert report(steps, ["a", "b"]) == {"steps": steps, "mean": 16.5, "backward_transfer": 3.0}


def test_without_the_baseline_the_outcome_is_the_same():
    with_it, without = (prune(tiny_model("llama"), texts(), baseline=b) for b in (True, False))
    assert "stasis" not in without.notes["continual"]
    for name, mask in with_it.kept.items():
        assert torch.equal(mask, without.kept[name])


def test_scores_that_are_not_finite_are_refused_by_name(monkeypatch):
    """A choice among them would leave everything where it is."""
    model = tiny_model("llama")
    monkeypatch.setattr("prunekit.pruners.copal.sensitivity", lambda W, gram: W * torch.nan)
    with pytest.raises(ConfigError, match=r"scores of weights\.0\.\S+ are not finite"):
        prune(model, texts(), baseline=False)


def test_patterns_hold():
    model = tiny_model("opt")
    for g in prune(model, texts(), pattern="2:4").groups:
        W = matrix(model, g)
        assert ((W.reshape(len(W), -1, 4) != 0).sum(2) == 2).all()


def test_a_text_with_too_few_samples_is_refused():
    with pytest.raises(ConfigError, match="a has 8 samples"):
        prune(tiny_model("llama"), texts(), held_out=8)


@pytest.mark.parametrize("ratio", [uniform(0.5), {"name": "owl", "target": 0.5}])
def test_a_pattern_that_does_not_divide_is_refused_before_a_weight_is_read(ratio):
    """Whether or not shapes tell the counts."""
    asked = problem(tiny_model("llama", meta=True), ratio=ratio)
    with pytest.raises(ConfigError, match="the 24 of pruner.pattern do not divide"):
        check("copal", asked, pattern="12:24")


def test_matrices_that_are_ranked_together_are_refused():
    asked = problem(tiny_model("llama", meta=True), ratio=uniform(0.5, ranking="global"))
    with pytest.raises(ConfigError, match="pruner=copal sees one matrix at a time"):
        check("copal", asked)


def words(*more):
    text = "{name: crop, dataset: pydocs, samples: 4, length: 16, seed: %d}"
    sets = "{one: " + text % 0 + ", two: " + text % 1 + "}"
    return (
        "criterion=none",
        "ratio.of=prunable",
        "ratio.target=0.5",
        "pruner=copal",
        "pruner.held_out=1",
        "calib=sequence",
        f"calib.texts={sets}",
        *more,
    )


def test_it_runs_from_the_command_line(tmp_path, monkeypatch):
    import compositions

    tiny = [w for w in compositions.TINY if not w.startswith("calib")]
    monkeypatch.setattr(compositions, "TINY", tiny)
    record = run(config(*words("save=false")), tmp_path)
    told = record["notes"]["continual"]
    assert told["texts"] == ["one", "two"]
    assert len(told["copal"]["steps"]) == 2
    assert record["provenance"]["calibration"]["shape"] == [8, 16]


def test_one_text_is_refused_before_anything_is_loaded():
    cfg = config("criterion=none", "pruner=copal") | {"calib": {"name": "crop"}}
    with pytest.raises(ConfigError, match="calib=crop gives one; possible: calib=sequence"):
        build_components(cfg)


def test_a_sequence_names_two_texts_of_one_length():
    one = {"name": "crop", "dataset": "pydocs"}
    with pytest.raises(ConfigError, match="two texts or more"):
        calibs.build({"name": "sequence", "texts": {"a": one}})
    with pytest.raises(ConfigError, match="all texts together are called calibration"):
        calibs.build({"name": "sequence", "texts": {"a": one, "calibration": one}})
    made = calibs.build({"name": "sequence", "texts": {"a": one, "b": one | {"length": 32}}})
    model, tokenizer = tiny_llama()
    with pytest.raises(ConfigError, match="one length"):
        made(tokenizer, model)


def test_all_texts_together_are_the_calibration_of_other_methods():
    sets = named_sets(texts(samples=2))
    assert list(sets) == ["calibration", "a", "b", "c"]
    assert sets["calibration"].shape == (6, 24)
    assert list(named_sets(sets["a"])) == ["calibration"]
