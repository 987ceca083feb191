"""The panel of what a pruned model kept, and the sentence by its rules."""

from __future__ import annotations

import pytest
from fakes import config, result

from prunekit.report import command as report
from prunekit.report.fidelity import numbers, panels, sentence
from prunekit.report.load import load
from prunekit.report.metrics import ordered
from prunekit.report.table import report_tables

DENSE = {"ppl_in_256": 20.0, "ppl_out_256": 40.0, "kl_in_256": 0.0, "loop_greedy": 0.1}


def here(seen: float, other: float, **more: float) -> dict[str, float]:
    return {"ppl_in_256": 20 * seen, "ppl_out_256": 40 * other, "kl_in_256": 0.1, **more}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (here(1.04, 1.05), "Perplexity is within 5% of the dense model's."),
        (
            here(1.21, 1.44),
            "Out-of-domain text suffers 1.9 times as much as the calibration text's domain "
            "(1.44 against 1.21 times the dense perplexity).",
        ),
        (
            here(0.98, 1.2),
            "Out-of-domain text suffers and not the calibration text's domain "
            "(1.20 against 0.98 times the dense perplexity).",
        ),
        (
            here(1.2, 1.2),
            "Text of all kinds suffers about alike (1.20 against 1.20 times the dense perplexity).",
        ),
        (
            here(2.0, 1.1),
            "The calibration text's own domain suffers most "
            "(1.10 against 2.00 times the dense perplexity).",
        ),
        ({"flips_mean": 0.2, "mcnemar_p_x": 0.3, "change_x": -0.1}, "20% of the answers flipped"),
        ({"flips_mean": 0.04}, ""),
        (
            {"flips_mean": 0.2, "mcnemar_p_x": 0.01, "change_x": -0.12, "mcnemar_p_y": 0.9},
            "Accuracy falls by 12 points on x.",
        ),
        ({"loop_greedy": 0.5}, "50% of what it writes goes in loops (dense: 10%)."),
        ({"loop_greedy": 0.19}, ""),
        ({}, ""),
        (
            here(1.0, 1.0, flips_mean=0.1, loop_greedy=0.4),
            "Perplexity is within 5% of the dense model's, 10% of the answers flipped though "
            "accuracy changed by no more than chance, and 40% of what it writes goes in loops",
        ),
        (
            {"ppl_out_256": 60.0, "kl_out_256": 1.0},
            "Perplexity is 1.50 times the dense model's on unseen text.",
        ),
    ],
)
def test_the_sentence_follows_its_rules(found, said):
    text = sentence(DENSE, found)
    assert text.startswith(said)
    assert bool(text) == bool(said)


def job(folder, row, target, ppl, **more):
    cfg = config(table="mine", row=row, ratio__target=target)
    dense = {"ppl_in_256": 20.0, "ppl_out_256": 40.0, "acc_arc_easy": 0.5, "params": 1e8}
    pruned = dense | {
        "ppl_in_256": 20 * ppl,
        "ppl_out_256": 80 * ppl,
        "kl_in_256": 0.2,
        "kl_out_256": 0.3,
        "top1_in_256": 0.8,
        "acc_arc_easy": 0.45,
        "flips_arc_easy": 0.15,
        "flips_mean": 0.15,
        "change_arc_easy": -0.05,
        "change_arc_easy_stderr": 0.02,
        "mcnemar_p_arc_easy": 0.2,
        "params": 9e7,
    }
    both = {"dense": dense | {"kl_in_256": 0.0, "kl_out_256": 0.0}, "pruned": pruned | more}
    flat = {f"{stage}/{key}": v for stage, found in both.items() for key, v in found.items()}
    result(folder / f"{row}-{target}", flat, cfg)


@pytest.fixture
def folder(tmp_path):
    for row, factor in (("A <b>", 1.1), ("B", 1.2), ("C", 1.3)):
        for target in (0.2, 0.5):
            job(tmp_path / "in", row, target, factor * (1 + target))
    return tmp_path / "in"


def test_a_panel_for_each_row_that_was_compared(folder):
    table = report_tables(load([folder]))[0]
    found = panels(table)
    assert [p.label for p in found][:2] == ["A <b> 20%", "B 20%"]
    lines = {line.title: line for line in found[0].lines}
    assert lines["perplexity, seen kind of text"].change == "1.32 x"
    assert lines["same most likely token, seen kind of text"].kept == 0.8
    told = lines["accuracy, arc_easy"]
    assert told.change == "-5.0 ± 3.9 points, p 0.2; 15.0% flipped"
    assert told.kept == pytest.approx(0.85)
    assert "kl_in_256" in numbers(table.rows[1])


def test_a_seed_that_was_not_compared_has_no_part_in_the_means(tmp_path):
    job(tmp_path, "A", 0.2, 1.5)
    plain = {"dense/ppl_x_128": 1.0, "pruned/ppl_x_128": 2.0}
    result(tmp_path / "0", plain, config(table="mine", row="A", ratio__target=0.2, seed=7))
    dense, pruned = (numbers(row) for row in report_tables(load([tmp_path]))[0].rows)
    assert (dense["ppl_in_256"], dense["ppl_x_128"]) == (20, 1)
    assert (pruned["ppl_in_256"], pruned["ppl_x_128"]) == (30, 2)


def test_every_form_says_the_sentence(folder, tmp_path, capsys):
    report.main([str(folder), "--to", str(tmp_path / "out")])
    said = "B 50%: Out-of-domain text suffers"
    assert said in capsys.readouterr().out.replace("\n", " ")
    for suffix in ("md", "html"):
        assert said.partition(": ")[2] in (tmp_path / "out" / f"report.{suffix}").read_text()


def test_names_and_sentences_are_text_on_the_page(folder, tmp_path):
    page = tmp_path / "report.html"
    report.main([str(folder), "--quiet", "--to", str(page)])
    panel = page.read_text().partition('<div class="panels">')[2]
    assert "<h4>A &lt;b&gt; 20%</h4>" in panel
    assert 'style="width:80%"' in panel
    assert "<details open>" in page.read_text()
    assert "B 50%: " not in page.read_text()  # said once, in the panel


def test_a_ratio_is_a_column_for_means_over_texts_only():
    keys = ["ppl_ptb_256", "ppl_ptb_256_to_dense", "ppl_out_256_to_dense", "kl_in_256", "params"]
    titles = [column.title for column in ordered([*keys, "loop_greedy", "needle_256_at50"])]
    expected = ["ptb@256", "out@256 / dense", "KL in@256", "loops", "needle 256 at50", "#Params"]
    assert titles == expected


def test_rows_that_were_not_compared_have_no_panel(tmp_path):
    cfg = config(table="mine", row="A")
    result(tmp_path / "in", {"dense/ppl_x_128": 1.0, "pruned/ppl_x_128": 2.0}, cfg)
    page = tmp_path / "report.html"
    report.main([str(tmp_path / "in"), "--quiet", "--to", str(page)])
    assert "What is kept of the dense model" not in page.read_text()
