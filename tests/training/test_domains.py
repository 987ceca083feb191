"""Dynamic batch loading: the authors' update, and domains drawn by their weights."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from paths import GOLDEN

from prunekit.training.domains import DomainExamples, updated


def example(token):
    return {"input_ids": [token], "labels": [token]}


def test_weights_are_those_of_sheared_llama():
    with np.load(GOLDEN / "sheared_llama.npz") as file:
        prop, ref, loss, expected = (file[f"dbl.{k}"] for k in ("prop", "ref", "loss", "doremi"))
    weights = {str(i): float(p) for i, p in enumerate(prop)}
    excess = {str(i): float(a - b) for i, (a, b) in enumerate(zip(loss, ref, strict=True))}
    assert list(updated(weights, excess).values()) == pytest.approx(expected.tolist(), abs=1e-7)


def test_a_domain_that_is_behind_is_drawn_more_often():
    domains = {"a": [example(1)] * 10, "b": [example(2)] * 10}
    asked = []

    def losses():
        asked.append(loader.drawn)
        return {"a": 2.0, "b": 5.0}

    loader = DomainExamples(domains, losses, {"a": 2.0, "b": 2.0}, every=200, seed=0)
    first = Counter(loader[i]["input_ids"][0] for i in range(200))
    second = Counter(loader[i]["input_ids"][0] for i in range(200))
    assert asked == [200]
    assert first[2] == pytest.approx(100, abs=25)
    assert second[2] > 180
    assert loader.history[0] == {"a": 0.5, "b": 0.5}


def test_every_example_of_a_domain_comes_before_one_comes_again():
    loader = DomainExamples({"a": [example(i) for i in range(7)]}, dict, {}, every=1, seed=0)
    drawn = [loader[0]["input_ids"][0] for _ in range(14)]
    assert sorted(drawn[:7]) == sorted(drawn[7:]) == list(range(7))
