"""A pruned model beside the dense one, in a run: the dense one against itself, one reference for a
sweep, and refusals.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compositions import config
from tiny_models import tiny_model

from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer
from prunekit.registry import evals
from prunekit.runner import cache
from prunekit.runner.dense import DenseModel
from prunekit.runner.run import run

NODES = {
    "divergence": {
        "name": "divergence",
        "texts": {"docs": {"dataset": "pydocs"}, "code": {"path": __file__}},
        "seen": ["docs"],
        "window": 32,
        "limit": 3,
        "top": 20,
    },
    "flips": {"name": "flips", "limit": 12},
}


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))


def ran(folder, *words, **more):
    run(config(*words) | {"eval": NODES, "save": False} | more, folder)
    return json.loads((folder / "result.json").read_text())


def bound(name, dense_model, model, cached=False, node=None):
    """The eval's numbers of `model`; the dense model is handed over only where it is asked for."""
    node = node or NODES[name]
    view = cache.open_cache({"seed": 0, "cache": cached, "eval": {name: node}})
    owner, tokenizer = DenseModel(view, lambda: dense_model), byte_tokenizer()
    itself = model if model is dense_model else None
    return owner.bound(name, evals.build(node), tokenizer, itself)(model, tokenizer)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_dense_model_has_lost_nothing(arch):
    model = tiny_model(arch, vocab_size=259)
    found = bound("divergence", model, model)
    for text in ("docs", "code", "in", "out"):
        assert abs(found[f"kl_{text}_32"]) < 1e-5
        assert found[f"top1_{text}_32"] == 1
        assert found[f"acceptance_{text}_32"] == pytest.approx(1, abs=1e-5)
    found = bound("flips", model, model)
    assert found["flips_mean"] == 0
    assert found["mcnemar_p_docs_cloze"] == 1


def test_a_copy_that_was_loaded_apart_has_lost_nothing_either():
    model, copy = (tiny_model("gpt2", vocab_size=259) for _ in range(2))
    found = bound("divergence", model, copy)
    assert abs(found["kl_code_32"]) < 1e-5
    assert found["top1_code_32"] == 1
    assert bound("flips", model, copy)["flips_mean"] == 0


@pytest.mark.parametrize("prompt", ["", "You are smaller now. "])
def test_the_numbers_are_those_of_a_loop(prompt):
    """With what a pruner left with the model before each window."""
    model, other = tiny_model("llama", vocab_size=259), tiny_model("llama", vocab_size=259)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.3)
    other.config.collaborative_prompt = prompt
    said = torch.tensor(byte_tokenizer()(prompt, add_special_tokens=False).input_ids).long()
    node = NODES["divergence"] | {"top": 259}
    found = bound("divergence", model, other, node=node)
    ids = byte_tokenizer()(Path(__file__).read_text(), add_special_tokens=False).input_ids
    windows = torch.tensor(ids)[: len(ids) // 32 * 32].view(-1, 32)
    windows = windows[torch.arange(3) * len(windows) // 3]
    with torch.no_grad():
        after = torch.cat([said.expand(3, -1), windows], 1)
        p, q = (
            m(input_ids=ids).logits[:, -32:-1].double().log_softmax(-1)
            for m, ids in ((model, windows), (other, after))
        )
    assert found["kl_code_32"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    overlap = torch.minimum(p.exp(), q.exp()).sum(-1).mean()
    assert found["acceptance_code_32"] == pytest.approx(float(overlap), rel=1e-5)
    nll = -q.gather(-1, windows[:, 1:, None]).mean()
    assert found["ppl_code_32"] == pytest.approx(float(nll.exp()), rel=1e-5)


def test_a_sweep_asks_the_dense_model_once(tmp_path, monkeypatch):
    asked = []
    from prunekit.activations import condensed
    from prunekit.evals import divergence

    def counted(*args, **kwargs):
        asked.append(kwargs["reference"] is None if "reference" in kwargs else True)
        return condensed.measure(*args, **kwargs)

    monkeypatch.setattr(divergence, "measure", counted)
    first = ran(tmp_path / "a", "ratio.target=0.2")
    assert asked == [True, True, False, False]  # two texts, dense and pruned
    second = ran(tmp_path / "b", "ratio.target=0.4")
    assert asked[4:] == [False, False]
    assert {"dense/divergence", "reference/divergence/docs", "reference/flips/items"} <= set(
        second["cached"]
    )
    without = ran(tmp_path / "c", "ratio.target=0.4", cache=False)
    assert without["results"] == second["results"]
    found = first["results"]
    assert found["pruned/kl_in_32"] > 10 * abs(found["dense/kl_in_32"])
    assert abs(found["dense/kl_in_32"]) < 1e-5
    ratio = found["pruned/ppl_out_32"] / found["dense/ppl_out_32"]
    assert found["pruned/ppl_out_32_to_dense"] == pytest.approx(ratio)


def test_a_checkpoint_is_compared_with_what_it_was_made_of(tmp_path):
    from prunekit.runner.again import configured, run_again

    record = run(config() | {"eval": NODES, "save": True}, tmp_path / "made")
    cfg = config() | {"eval": NODES, "save": False}
    cfg = configured(cfg, tmp_path / "made" / "checkpoint")
    again = run_again(cfg, tmp_path / "again", recover=False)["results"]
    for key in ("pruned/kl_in_32", "pruned/top1_out_32", "pruned/flips_docs_cloze"):
        assert again[key] == pytest.approx(record["results"][key], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"texts": {"in": {"dataset": "pydocs"}}, "seen": ["in"]}, "cannot be called 'in'"),
        ({"seen": ["news"]}, "seen=news is no text"),
        ({"seen": []}, "docs counts as unseen, but calib=crop reads pydocs"),
        ({"top": 0}, "top=0"),
    ],
)
def test_what_cannot_be_is_refused_before_work(change, says):
    from prunekit.runner.preflight import build_components

    with pytest.raises(ConfigError, match=says):
        build_components(config() | {"eval": {"d": NODES["divergence"] | change}})


def test_items_that_are_not_right_or_wrong_are_refused():
    from prunekit.evals.flips import correct

    half = {"samples": {"x": [{"doc_id": 0, "f1": 0.5, "metrics": ["f1"]}]}}
    with pytest.raises(ConfigError, match="items of x are not right or wrong"):
        correct(half, "x")


def test_the_items_of_a_group_are_those_of_the_groups_in_it():
    """lm-eval names a group's direct children only: mmlu is groups of tasks."""
    from prunekit.evals.flips import correct

    items = {"a": [1, 0], "b": [1], "c": [0]}
    found = {
        "samples": {
            task: [{"doc_id": i, "acc": v, "metrics": ["acc"]} for i, v in enumerate(values)]
            for task, values in items.items()
        },
        "group_subtasks": {"all": ["stem", "c"], "stem": ["a", "b"]},
    }
    assert correct(found, "all").tolist() == [1, 0, 1, 0]
    assert correct(found, "stem").tolist() == [1, 0, 1]
