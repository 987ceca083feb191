"""Several kinds of text at once: the mean over unseen ones, even windows, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from compositions import config

from prunekit.errors import ConfigError
from prunekit.evals.divergence import numbers
from prunekit.evals.named_texts import spread
from prunekit.models.tiny import tiny_llama
from prunekit.registry import evals
from prunekit.runner.preflight import build_components
from prunekit.runner.run import run


@pytest.fixture
def texts(tmp_path):
    """name -> a text by path."""
    found = {}
    for i, name in enumerate(("a", "b", "c")):
        path = tmp_path / f"{name}.txt"
        path.write_text(" ".join(str((i + 3) * j) for j in range(300)))
        found[name] = {"path": str(path)}
    return found


def test_the_mean_is_geometric_and_leaves_out_what_was_seen(texts):
    model, tokenizer = tiny_llama(layers=2, device="cpu")
    node = {"name": "domains", "texts": texts, "window": 32, "limit": 3, "seen": ["b"]}
    found = evals.build(node)(model, tokenizer)
    assert list(found) == ["ppl_a_32", "ppl_b_32", "ppl_c_32", "ppl_unseen_32"]
    mean = math.sqrt(found["ppl_a_32"] * found["ppl_c_32"])
    assert found["ppl_unseen_32"] == pytest.approx(mean, rel=1e-6)
    one = {"name": "perplexity", "path": texts["a"]["path"], "window": 32, "bos": False}
    whole = evals.build(one)(model, tokenizer)["ppl_a_32"]
    every = evals.build(node | {"limit": 10**6})(model, tokenizer)["ppl_a_32"]
    assert every == pytest.approx(whole, rel=1e-6)


def test_a_perplexity_beyond_float64_is_infinite_whoever_measures_it(texts):
    model, tokenizer = tiny_llama(layers=2, device="cpu")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    for node in ({"name": "domains"}, {"name": "positions", "edges": [8]}):
        more = {"texts": {"a": texts["a"]}, "window": 32, "limit": 2}
        found = evals.build(node | more)(model, tokenizer)
        assert math.isinf(next(iter(found.values())))
    means = {key: torch.tensor([800.0]) for key in ("kl", "kl_gap", "top1", "acceptance")}
    means |= {"acceptance_gap": means["kl"], "nll": means["kl"]}
    assert math.isinf(numbers({"a": means}, "a_32")["ppl_a_32"])


def test_windows_are_spread_over_the_text():
    windows = torch.arange(10)[:, None]
    assert spread(windows, 4).flatten().tolist() == [0, 2, 5, 7]
    assert spread(windows, 20).flatten().tolist() == list(range(10))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"texts": {}}, "name a text at least"),
        ({"texts": {"a": {}}}, "either a dataset or a path"),
        ({"texts": {"a": {"dataset": "ptb", "path": "x"}}}, "is not a file"),
        ({"texts": {"a": {"dataset": "nothing"}}}, "texts="),
        ({"texts": {"a": {"dataset": "ptb", "spilt": "test"}}}, "texts="),
    ],
)
def test_a_text_that_is_none_is_refused(node, message):
    with pytest.raises(ConfigError, match=message):
        evals.build({"name": "domains", **node})


def test_text_that_was_calibrated_on_must_be_called_seen(texts):
    node = {"name": "domains", "texts": texts | {"python": {"dataset": "pydocs"}}}

    def check(calib, **more):
        build_components(config() | {"eval": {"d": node | more}, "calib": calib})

    pydocs = {"name": "crop", "dataset": "pydocs"}
    by_path = {"name": "text", "path": texts["a"]["path"], "share": 1}
    with pytest.raises(ConfigError, match=r"python counts as unseen, but calib=crop reads pydocs"):
        check(pydocs)
    check(pydocs, seen=["python"])
    inside = {"name": "mix", "texts": {"one": pydocs | {"share": 1}, "two": by_path}}
    with pytest.raises(ConfigError, match=r"a counts as unseen, but calib=mix reads .*a.txt"):
        check(inside, seen=["python"])
    check(inside, seen=["python", "a"])
    with pytest.raises(ConfigError, match=r"seen=d is no text; there are: a, b, c, python"):
        check(pydocs, seen=["d"])
    with pytest.raises(ConfigError, match="none to average over"):
        check(pydocs, seen=["a", "b", "c", "python"])


def test_a_run_reports_the_mean_relative_to_dense(texts, tmp_path):
    node = {"name": "domains", "texts": texts, "window": 32}
    run(config() | {"eval": {"domains": node}, "save": False}, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "result.json").read_text())["results"]
    ratio = found["pruned/ppl_unseen_32"] / found["dense/ppl_unseen_32"]
    assert found["pruned/ppl_unseen_32_to_dense"] == pytest.approx(ratio)
    assert "dense/ppl_unseen_32_to_dense" not in found
