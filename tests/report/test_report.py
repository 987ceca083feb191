"""The report: seeds become means, the paper's numbers stand beside ours, failures are named, and
the page works in a real browser.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fakes import config, result, stages

from prunekit.errors import ConfigError
from prunekit.report import command as report
from prunekit.report import exporters
from prunekit.report.formatting import heads, remarks
from prunekit.report.load import load
from prunekit.report.paper import paper
from prunekit.report.table import report_tables

LLAMA = {"name": "hf", "path": "huggyllama/llama-7b"}


@pytest.fixture
def table1(tmp_path: Path) -> Path:
    """Three rows of the paper's Table 1, two seeds each, one of them recovered, and a failed and a
    killed job.
    """
    for seed in (0, 1):
        for row, ppl in (("L2", 600.0), ("Random", 30.0)):
            cfg = config(
                table="llm_pruner/table1", row=row, seed=seed, calib__seed=seed, model=LLAMA
            )
            result(tmp_path / f"{row}-{seed}", stages(12.6, ppl + seed), cfg)
        cfg = config(table="llm_pruner/table1", row="Element1", seed=seed, model=LLAMA)
        curve = {
            "recovery_curve": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_loss": 2.5}]
        }
        result(
            tmp_path / f"Element1-{seed}", stages(12.6, 19.0 + seed, 17.0 + seed), cfg, notes=curve
        )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "failed.txt").write_text(
        "Traceback (most recent call last):\n  File x\nMemoryError: out of it\n"
    )
    (tmp_path / "killed" / ".hydra").mkdir(parents=True)
    (tmp_path / "killed" / "run.log").write_text("")
    return tmp_path


def sheet_of(folder: Path):
    return report_tables(load([folder]))[0]


def test_seeds_become_a_mean_and_a_deviation(table1):
    rows = {(r.label, r.stage): r for r in sheet_of(table1).rows}
    cell = rows["Element1", "pruned"].cells["ppl_wikitext2_128"]
    assert (cell.mean, cell.n) == (19.5, 2)
    assert cell.spread == pytest.approx(0.5**0.5)
    # The dense model agrees in every job: one measurement with its own standard error.
    dense = rows["dense", "dense"].cells["ppl_wikitext2_128"]
    assert (dense.mean, dense.n) == (12.6, 1)
    assert dense.spread == pytest.approx(12.6 / 50)


def test_a_job_that_was_run_again_is_no_other_seed(tmp_path):
    for name, seed, ppl in (("a", 0, 20.0), ("again", 0, 20.0), ("b", 1, 22.0)):
        cfg = config(seed=seed, calib__seed=seed)
        result(tmp_path / name, stages(12.6, ppl) | {"pruned/prefill_ms": 1.0}, cfg)
    pruned = next(r for r in sheet_of(tmp_path).rows if r.stage == "pruned")
    cell = pruned.cells["ppl_wikitext2_128"]
    assert (cell.mean, cell.n) == (21.0, 2)
    assert pruned.cells["prefill_ms"].n == 2  # equal numbers of two seeds are two
    assert any("run again with the same seed" in line for line in remarks(sheet_of(tmp_path)))
    shutil.rmtree(tmp_path / "b")
    assert not any(
        "seed" in line and "one seed" not in line for line in remarks(sheet_of(tmp_path))
    )


@pytest.mark.parametrize(
    ("pruner", "criterion", "label"),
    [
        ("oneshot", "taylor", "taylor"),
        ("unstructured", "wanda", "unstructured, wanda"),
        ("database", "none", "database"),
    ],
)
def test_a_job_alone_is_called_by_its_method(tmp_path, pruner, criterion, label):
    cfg = config(pruner__name=pruner, criterion__name=criterion)
    result(tmp_path / "a", stages(12.6, 20.0), cfg)
    assert [r.label for r in sheet_of(tmp_path).rows] == ["dense", label]


def test_a_part_that_a_plain_configuration_leaves_out_is_none(tmp_path):
    result(tmp_path / "a", stages(12.6, 20.0), config(criterion=None, ratio=None))
    pruned = next(r for r in sheet_of(tmp_path).rows if r.stage == "pruned")
    assert (pruned.label, pruned.target) == ("none", None)


def test_zeros_are_told_where_nothing_was_cut_out(tmp_path):
    sizes = {"dense": (200, 190), "pruned": (200, 95), "recovered": (150, 95)}
    numbers = {"dense/ppl_wikitext2_128": 12.6, "pruned/ppl_wikitext2_128": 19.0}
    for stage, (params, nonzero) in sizes.items():
        numbers |= {f"{stage}/params": params, f"{stage}/params_nonzero": nonzero}
    result(tmp_path / "job", numbers, config())
    rows = sheet_of(tmp_path).rows
    assert [heads(r)[1] for r in rows] == ["0.0%", "50.0% zeros", "25.0%"]
    numbers |= {"pruned/params": 201}  # a bias in place of what was zeroed
    result(tmp_path / "biased" / "job", numbers, config())
    assert [heads(r)[1] for r in sheet_of(tmp_path / "biased").rows][1] == "50.0% zeros"
    shutil.rmtree(tmp_path / "biased")
    found = load([tmp_path])
    told = csv.DictReader(io.StringIO(exporters.table_csv(report_tables(found), found)))
    assert {(r["stage"], r["removed"], r["zeros"]) for r in told} == {
        ("dense", "0.0", "0.0"),
        ("pruned", "0.0", "0.5"),
        ("recovered", "0.25", "0.0"),
    }


def test_rows_stand_in_the_papers_order_and_beside_its_numbers(table1):
    sheet = sheet_of(table1)
    assert [(r.label, r.stage) for r in sheet.rows] == [
        ("dense", "dense"),
        ("L2", "pruned"),
        ("Random", "pruned"),
        ("Element1", "pruned"),
        ("Element1", "recovered"),
    ]
    theirs = [r.cells["ppl_wikitext2_128"].paper for r in sheet.rows]
    assert theirs == [12.62, 582.41, 27.51, 19.09, 17.58]
    assert sheet.comparable
    assert sheet.orders["WikiText2"] == (6, 6)


def test_another_model_is_not_subtracted(tmp_path):
    result(tmp_path / "a", stages(12.6, 20.0), config(table="llm_pruner/table1", row="L2"))
    sheet = sheet_of(tmp_path)
    assert not sheet.comparable
    assert "(+" not in report.FORMS[".md"]([sheet], load([tmp_path]))


def test_best_of_a_block_is_marked_once(table1):
    marks = [(r.label, r.stage) for r in sheet_of(table1).rows if r.cells["ppl_wikitext2_128"].best]
    assert marks == [("Element1", "pruned")]  # a block of one has no best


def test_jobs_without_an_experiment_are_named_by_what_differs(tmp_path):
    for i, (criterion, target, samples) in enumerate(
        [("taylor", 0.1, 10), ("taylor", 0.3, 10), ("l2", 0.1, 10)]
    ):
        cfg = config(criterion={"name": criterion}, ratio__target=target, calib__samples=samples)
        result(tmp_path / str(i), stages(10, 20 + i), cfg)
    rows = sheet_of(tmp_path).rows
    assert {(r.label, r.target) for r in rows if r.stage == "pruned"} == {
        ("taylor", 0.1),
        ("taylor", 0.3),
        ("l2", 0.1),
    }


def test_a_number_that_is_not_finite_is_no_number(tmp_path):
    result(
        tmp_path / "a",
        stages(10, 20) | {"pruned/ppl_wikitext2_128": None},
        config(),
        not_finite=["pruned/ppl_wikitext2_128"],
    )
    cell = next(r for r in sheet_of(tmp_path).rows if r.stage == "pruned").cells[
        "ppl_wikitext2_128"
    ]
    assert cell.mean is None
    assert "not finite" in report.FORMS[".md"]([], load([tmp_path]))


def test_a_job_that_did_not_measure_a_metric_has_no_part_in_its_mean(tmp_path):
    result(tmp_path / "a", stages(12.6, 19.0), config(seed=0))
    task = {"dense/acc_piqa": 0.7, "pruned/acc_piqa": 0.6}
    result(tmp_path / "b", task, config(seed=1))
    (sheet,) = report_tables(load([tmp_path]))
    for row, ppl, acc in zip(sheet.rows, (12.6, 19.0), (70, 60), strict=True):
        cells = row.cells["ppl_wikitext2_128"], row.cells["acc_piqa"]
        assert [(c.mean, c.n) for c in cells] == [(ppl, 1), (pytest.approx(acc), 1)]
    assert not any("measured up to" in line for line in remarks(sheet))


def test_failed_and_unfinished_jobs_are_named_and_make_the_status(table1, capsys):
    assert report.main([str(table1)]) == 1
    out = capsys.readouterr().out
    assert "MemoryError: out of it" in out
    assert "killed" in out


def test_an_eval_that_was_killed_is_unfinished(tmp_path):
    """`prunekit eval` and `recover` leave no .hydra: the lock that they held tells."""
    again = tmp_path / "again"
    again.mkdir()
    for name in ("run.log", ".running"):
        (again / name).touch()
    assert load([tmp_path]).unfinished == [again]
    result(again, stages(12.6, 19.0), config(seed=0))
    assert load([tmp_path]).unfinished == []


def test_many_failures_are_folded_away_on_the_page(table1, tmp_path):
    for count, state in ((1, "<details open>"), (9, "<details>")):
        for i in range(count):
            (table1 / f"typo{i}").mkdir(exist_ok=True)
            (table1 / f"typo{i}" / "failed.txt").write_text("ConfigError: no such thing\n")
        report.main([str(table1), "--quiet", "--to", str(tmp_path / "r.html")])
        found = re.search(
            r"<details.*?>(?=<summary>(\d+) jobs failed)", (tmp_path / "r.html").read_text()
        )
        assert found
        assert (found[0], int(found[1])) == (state, count + 2)


def test_every_form_is_written(table1, tmp_path):
    target = tmp_path / "out"
    report.main([str(table1), "--quiet", "--to", str(target)])
    assert {p.name for p in target.iterdir()} == {
        "report.md",
        "report.tex",
        "report.csv",
        "report.html",
    }
    assert "**19.50 ± 0.71** / 19.09 (+0.41)" in (target / "report.md").read_text()
    assert r"\toprule" in (target / "report.tex").read_text()
    lines = list(csv.DictReader(io.StringIO((target / "report.csv").read_text())))
    assert any(x["stage"] == "failed" and "MemoryError" in x["note"] for x in lines)
    page = (target / "report.html").read_text()
    assert not re.search(r'(src|href)="https?:', page.split("<script>")[0])


def test_jobs_stand_in_the_order_of_their_numbers_and_name_what_says_the_same_once(tmp_path):
    for i in (10, 2, 1):
        cfg = config(
            exclude={"name": "range", "heads": [i, i + 1], "neurons": [i, i + 1]}, row="layer"
        )
        result(tmp_path / f"layer_{i}", stages(10, 11 + i), cfg)
    [table] = report_tables(load([tmp_path]))
    assert [r.label for r in table.rows[1:]] == [
        f"layer, exclude.heads=[{i}, {i + 1}]" for i in (1, 2, 10)
    ]


def test_every_form_says_where_in_a_cell_the_papers_number_stands(table1):
    found = load([table1])
    tables = report_tables(found)
    for form in (exporters.markdown, exporters.latex):
        text = form(tables, found)
        assert "After the slash: " in text
        assert "Second line" not in text
    assert any(line.startswith("Second line of a cell: ") for line in remarks(tables[0]))


def test_latex_escapes_what_it_must():
    assert exporters.tex("a_b & 5 %") == r"a\_b \& 5 \%"


def test_unknown_form_and_missing_folder_are_refused(table1, tmp_path):
    with pytest.raises(ConfigError, match="cannot write"):
        report.main([str(table1), "--to", "x.pdf"])
    with pytest.raises(ConfigError, match="is not a folder"):
        report.main([str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"config": ', "JSONDecodeError"),
        ("[]", "its content"),
        ('{"config": {}}', "config.model"),
        ("\udcff", "UnicodeDecodeError"),
        ("[" * 10**5, "RecursionError"),
    ],
)
def test_half_a_file_is_named_beside_the_others(tmp_path, text, says):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text(text, errors="surrogateescape")
    result(tmp_path / "b", stages(10, 20), config())
    found = load([tmp_path])
    assert re.search(f"result.json is not a result file.*{says}", found.failed[tmp_path / "a"])
    assert [r.folder for r in found.results] == [tmp_path / "b"]
    assert report.main([str(tmp_path), "--quiet"]) == 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"kept": {"neurons.0": [1, 2, 3]}}, "kept.neurons.0"),
        ({"importance": []}, "importance"),
        ({"results": {"pruned/x": "12"}}, "results.pruned/x"),
        ({"notes": {"recovery_curve": [{"step": "1"}]}}, "notes.recovery_curve.0.step"),
    ],
)
def test_what_in_a_file_is_not_a_result_is_named(tmp_path, more, says):
    result(tmp_path / "a", stages(10, 20), config(), **more)
    assert says in load([tmp_path]).failed[tmp_path / "a"]


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "result.json")
    assert "result.json is not a file" in load([tmp_path]).failed[tmp_path]


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&\"'<!--<script>"


def evil(folder: Path) -> Path:
    """Results whose every name is markup, among them a failed and an unfinished job."""
    for i in (0, 1):
        cfg = config(row=EVIL + str(i), table=EVIL, model={"name": EVIL, "path": EVIL})
        numbers = {
            f"{stage}/{key}": 1.0 + i
            for stage in ("dense", "pruned", "recovered")
            for key in (f"ppl_{EVIL}_128", f"acc_{EVIL}")
        }
        for target in (0.1, 0.2):
            result(
                folder / f"{i}{target}",
                numbers,
                cfg | {"ratio": {"name": EVIL, "target": target}},
                kept={f"{EVIL.replace('/', '')}.0": [1, 2]},
                importance={f"{EVIL.replace('/', '')}.0": {"mean": 1.0}},
                notes={"recovery_curve": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]},
                not_finite=[EVIL],
            )
    failed = folder / "failed <script>alert(1)<"
    failed.mkdir()
    (failed / "failed.txt").write_text(EVIL)
    return folder


def test_nothing_from_a_result_becomes_markup(tmp_path):
    from plotly.offline import get_plotlyjs

    report.main([str(evil(tmp_path / "in")), "--quiet", "--to", str(tmp_path / "r.html")])
    page = (tmp_path / "r.html").read_text().replace(get_plotlyjs(), "")
    assert "<img" not in page
    assert "alert(1)</script>" not in page
    assert "<!--<script" not in page
    assert page.count("<script") == 3
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page


def test_losses_that_are_not_finite_are_left_out_of_the_curves(tmp_path):
    curve = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}]
    result(tmp_path / "a", stages(10, 20, 15), config(), notes={"recovery_curve": curve})
    report.main([str(tmp_path), "--quiet", "--to", str(tmp_path / "r.html")])
    assert '"loss":[[2,1.0]]' in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("n", [*range(1, 11), *range(12, 18)])
def test_the_papers_tables_are_data_with_a_source(n):
    found = paper(f"llm_pruner/table{n}")
    assert found is not None
    assert found.rows
    assert "2305.11627" in found.source


PROBE = """
<script>
const errors = [];
window.addEventListener("error", (e) => errors.push(e.message));
console.error = (...a) => errors.push(a.join(" "));
window.addEventListener("load", () => setTimeout(() => {
  const table = document.querySelector("table");
  const names = () => [...table.tBodies[0].rows].map((r) => r.cells[0].textContent);
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex((h) => h.textContent === "WikiText2");
  const click = () => { heads[column].firstChild.click(); return names(); };
  const up = click(), down = click();
  document.getElementById("theme").click();
  const plots = document.querySelectorAll(".js-plotly-plot").length;
  const first = document.querySelector(".js-plotly-plot").data;
  const marks = first.filter((t) => t.mode === "markers");
  const colours = Object.fromEntries(marks.map((t) => [t.name, t.marker.color]));
  const front = first.filter((t) => t.name === "Pareto front").map((t) => [t.x, t.y]);
  const wide = document.documentElement.scrollWidth > window.innerWidth + 1;
  document.body.innerHTML = "<pre id=probe></pre>";
  const found = { up, down, plots, colours, front, wide, errors };
  document.getElementById("probe").textContent = JSON.stringify(found);
}, 300));
</script>
"""


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("needs a browser: apt-get install chromium")
    return found


def opened(page: Path, size: str, folder: Path) -> dict:
    """What the probe in the page found."""
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += [f"--window-size={size}", "--virtual-time-budget=8000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(
        re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)[1]
        .replace("&gt;", ">")
        .replace("&lt;", "<")
    )


def test_markup_in_results_is_shown_as_text_by_a_real_browser(tmp_path):
    page = tmp_path / "report.html"
    report.main([str(evil(tmp_path / "in")), "--quiet", "--to", str(page)])
    probe = PROBE[: PROBE.index("const table")] + PROBE[PROBE.index("const plots") :]
    probe = probe.replace("up, down, plots, colours, front", "images, plots").replace(
        "const plots", 'const images = document.querySelectorAll("img").length;\n  const plots'
    )
    page.write_text(page.read_text().replace("<main>", probe + "<main>"))
    found = opened(page, "1280,900", tmp_path)
    assert found["errors"] == []
    assert found["images"] == 0
    assert found["plots"] >= 4


@pytest.mark.parametrize("size", ["1280,900", "390,844"])
def test_the_page_sorts_and_draws_in_a_real_browser_without_an_error(table1, tmp_path, size):
    page = tmp_path / "report.html"
    report.main([str(table1), "--quiet", "--to", str(page)])
    page.write_text(page.read_text().replace("<main>", PROBE + "<main>"))
    found = opened(page, size, tmp_path)
    assert found["errors"] == []
    assert found["up"] == ["dense", "Element1", "Element1", "Random", "L2"]
    assert found["down"] == found["up"][::-1]
    assert found["plots"] >= 5
    colours = found["colours"]
    assert set(colours) == {"dense", "L2", "Random", "Element1", "Element1, recovered"}
    assert colours.pop("Element1, recovered") == colours["Element1"]  # a colour is a method's
    assert len(set(colours.values())) == 4
    assert len(found["front"]) == 1
    assert not found["wide"]  # a phone scrolls the table, not the page
