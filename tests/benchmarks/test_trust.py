"""The tables of the experiments on trust, from results that were made up to say something."""

from __future__ import annotations

import importlib.util

import pytest
from fakes import config, result
from paths import ROOT

from prunekit.report.load import load

SPEC = importlib.util.spec_from_file_location("trust", ROOT / "benchmarks" / "trust.py")
trust = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(trust)


def job(folder, row, target, dense, pruned, recovered=None):
    stages = {"dense": dense, "pruned": pruned} | ({"recovered": recovered} if recovered else {})
    flat = {f"{stage}/{key}": v for stage, found in stages.items() for key, v in found.items()}
    result(
        folder / f"{row}-{target}".replace(" ", "_"), flat, config(row=row, ratio__target=target)
    )


def line(text: str, start: str) -> list[str]:
    return [c.strip() for c in next(x for x in text.splitlines() if x.startswith(start)).split("|")]


def test_drop_points_of_masks_by_size_and_at_random(tmp_path):
    for row, break_ in (("magnitude", 0.3), ("random", 0.1)):
        for target in (0.1, 0.2, 0.3, 0.4):
            ppl = 20 * (1 + 10 * max(0, target - break_))
            job(tmp_path, row, target, {"ppl_in_256": 20.0}, {"ppl_in_256": ppl})
    text = trust.essential(load([tmp_path]).results)
    assert line(text, "| magnitude")[3:7] == ["0.3", "0.3", "0.3", "0.35"]
    assert line(text, "| random")[3:5] == ["0.1", "0.1"]


def test_the_knee_is_seen_beside_a_perplexity_of_millions(tmp_path):
    dense = {"ppl_in_256": 20.0}
    for target, ppl in ((0.1, 20.0), (0.2, 21.0), (0.3, 1e3), (0.4, 1e5), (0.5, 1e7)):
        job(tmp_path, "magnitude", target, dense, {"ppl_in_256": ppl})
    assert line(trust.essential(load([tmp_path]).results), "| magnitude")[5] == "0.2"


def test_a_fine_tuned_model_stands_for_the_dense_one_where_nothing_is_removed(tmp_path):
    dense, pruned = {"ppl_in_256": 20.0}, {"ppl_in_256": 30.0}
    job(tmp_path, "retrained", 0.0, dense, dense, {"ppl_in_256": 10.0})
    job(tmp_path, "retrained", 0.3, dense, pruned, {"ppl_in_256": 15.0})
    assert trust.curve_of(load([tmp_path]).results, "ppl_in_256") == {0.0: 10.0, 0.3: 15.0}


def test_dense_against_itself_matches_everywhere(tmp_path):
    same = {"ppl_in_256": 20.0, "acc_arc_easy": 0.5, "rouge_l_greedy": 1.0}
    job(tmp_path, "Wanda", 0.2, same, same)
    job(tmp_path, "Wanda", 0.4, same, same | {"acc_arc_easy": 0.4, "rouge_l_greedy": 0.96})
    text = trust.kick(load([tmp_path]).results)
    assert text.startswith("**LLM-KICK in little, without its data and its judge")
    assert "✗" not in "".join(line(text, "| Wanda 20%"))
    assert line(text, "| Wanda 40%")[3] == "0.4 (-20 %) ✗"
    assert line(text, "| **Wanda: largest")[2:5] == ["**40%**", "**20%**", "**40%**"]


def test_arms_are_set_beside_the_one_that_lost_nothing(tmp_path):
    for domain, key, dense, whole in (
        ("web", "ppl_c4_256", 40.0, 30.0),
        ("articles", "ppl_wikitext2_256", 30.0, 20.0),
        ("dialogue", "ppl_dialogue_256", 20.0, 10.0),
    ):
        job(tmp_path, f"sparse {domain}", 0.0, {key: dense}, {key: dense}, {key: whole})
        for arm, factor in (("sparse", dense / 10), ("frozen", 1.5), ("dense", 2.0)):
            after = {key: whole * factor}
            job(tmp_path, f"{arm} {domain}", 0.3, {key: dense}, {key: 99.0}, after)
    text = trust.junk(load([tmp_path]).results)
    assert line(text, "| web")[5:10] == ["+300 %", "+50 %", "+100 %", "+250 %", "+200 %"]
    assert "difficulty and the sparse arm's loss: 1.00" in text


def test_methods_that_are_ordered_differently_are_named(tmp_path):
    for row, ppl, kl in (("A", 20.0, 0.3), ("B", 21.0, 0.2), ("C", 22.0, 0.4)):
        job(tmp_path, row, 0.2, {"ppl_in_256": 19.0}, {"ppl_in_256": ppl, "kl_in_256": kl})
    text = trust.ranks(load([tmp_path]).results)
    assert line(text, "| A")[2:4] == ["20 (1)", "0.3 (2)"]
    assert "ordered differently by ppl_in_256 and kl_in_256: A / B\n" in text


def test_what_was_not_measured_has_no_number(tmp_path):
    job(tmp_path, "A", 0.2, {"ppl_in_256": 19.0}, {"ppl_in_256": 20.0, "kl_in_256": 0.3})
    job(tmp_path, "B", 0.2, {"ppl_in_256": 19.0}, {"ppl_in_256": 21.0})
    assert line(trust.ranks(load([tmp_path]).results), "| B")[2:4] == ["21 (2)", "-"]


@pytest.mark.parametrize("key", ["ppl_x", "kl_x", "flips_mean", "loop_greedy"])
def test_less_is_better_of(key):
    assert trust.better(key) == -1
    assert trust.better("acc_x") == 1
