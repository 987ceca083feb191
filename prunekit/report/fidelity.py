"""What is kept of the dense model, at a glance: one panel for each row that was compared with it,
and one sentence by stated rules.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prunekit.report.table import ReportTable, Row

NOTICED = 0.05
"""A perplexity so much above the dense one, and a share of answers that flipped, are spoken of."""
UNEVEN = 1.5
"""Text of one side suffers more if its log perplexity rises so many times as much."""
LOOPING = 0.1
"""So much more of an answer in loops than in the dense model's is spoken of."""
CHANCE = 0.05
"""A p below this is no chance."""
BOUND = 1.96
"""Standard errors to either side of a 95 % interval."""


@dataclass(frozen=True)
class Line:
    """One measurement: its name, the dense model's and this model's number, what that comes to, and
    how much is kept of it, 0 to 1, None where that is no share.
    """

    title: str
    dense: str
    here: str
    change: str
    kept: float | None


@dataclass(frozen=True)
class Panel:
    """What a row lost: `lines` to look at, `sentence` to read."""

    label: str
    sentence: str
    lines: list[Line]


Numbers = dict[str, float]


def panels(table: ReportTable) -> list[Panel]:
    """Of the rows that were compared with the dense model; others have none."""
    dense = next((numbers(row) for row in table.rows if row.stage == "dense"), {})
    found = []
    for row in table.rows:
        here = numbers(row)
        lines = [*texts(dense, here), *answers(dense, here), *writing(dense, here)]
        if row.stage != "dense" and lines:
            name = row.label + ("" if row.target is None else f" {row.target:.0%}")
            name += ", recovered" * (row.stage == "recovered")
            found.append(Panel(name, sentence(dense, here), lines))
    return found


def numbers(row: Row) -> Numbers:
    """The means over the seeds that measured it, of everything that was measured; what was not
    finite is left out.
    """
    stages = [r.numbers[row.stage] for r in row.results]
    found = {}
    for key in dict.fromkeys(key for stage in stages for key in stage):
        given = [stage[key] for stage in stages if key in stage]
        values = [value for value in given if value is not None and math.isfinite(value)]
        if len(values) == len(given):
            found[key] = statistics.fmean(values)
    return found


def window_of(here: Numbers) -> str:
    """The window of the divergence, empty where there is none."""
    keys = [k for k in here if k.startswith(("kl_in_", "kl_out_")) and k.count("_") == 2]
    return keys[0].rpartition("_")[2] if keys else ""


def texts(dense: Numbers, here: Numbers) -> Iterator[Line]:
    """Perplexity, KL and agreement on text of the calibration text's kind, and of others."""
    window = window_of(here)
    for side, name in (("in", "seen kind of text"), ("out", "other text")):
        key = f"ppl_{side}_{window}"
        if key in here and key in dense:
            ratio = here[key] / dense[key]
            shown = f"{here[key]:.1f}", f"{ratio:.2f} x"
            yield Line(f"perplexity, {name}", f"{dense[key]:.1f}", *shown, min(1, 1 / ratio))
        key = f"kl_{side}_{window}"
        if key in here:
            yield Line(f"KL, {name}", "0", f"{here[key]:.3f}", "nats a token", None)
        key = f"top1_{side}_{window}"
        if key in here:
            shown = f"{here[key]:.1%}", "of positions"
            yield Line(f"same most likely token, {name}", "100%", *shown, here[key])


def answers(dense: Numbers, here: Numbers) -> Iterator[Line]:
    """Accuracy of each task with its paired interval, and what flipped."""
    for key in here:
        if not key.startswith("flips_") or key.startswith(("flips_to_", "flips_mean")):
            continue
        task = key.removeprefix("flips_")
        accuracy = next((k for k in (f"acc_{task}", f"acc_norm_{task}") if k in here), "")
        if not accuracy or accuracy not in dense:
            continue
        change = here.get(f"change_{task}", 0.0)
        error = BOUND * here.get(f"change_{task}_stderr", 0.0)
        p = here.get(f"mcnemar_p_{task}", 1.0)
        told = f"{100 * change:+.1f} ± {100 * error:.1f} points, p {p:.2g}; {here[key]:.1%} flipped"
        shown = f"{dense[accuracy]:.1%}", f"{here[accuracy]:.1%}", told
        yield Line(f"accuracy, {task}", *shown, 1 - here[key])


def writing(dense: Numbers, here: Numbers) -> Iterator[Line]:
    """How answers are: of the dense model's words, in loops, at an end, declined."""
    for key, name in (
        ("rouge_l_greedy", "ROUGE-L with the dense answers"),
        ("loop_greedy", "share of an answer in loops"),
        ("stopped_greedy", "answers that end"),
        ("declined", "declined what is to be declined"),
    ):
        if key in here and key in dense:
            kept = here[key] if key == "rouge_l_greedy" else None
            change = f"{100 * (here[key] - dense[key]):+.1f} points"
            yield Line(name, f"{dense[key]:.1%}", f"{here[key]:.1%}", change, kept)


def sentence(dense: Numbers, here: Numbers) -> str:
    """What was lost, in words: `about_texts`, then `about_answers`, then `about_writing`, as far as
    there is something to say.
    """
    parts = [f(dense, here) for f in (about_texts, about_answers, about_writing)]
    said = [part for part in parts if part]
    if not said:
        return ""
    text = said[0] if len(said) == 1 else f"{', '.join(said[:-1])}, and {said[-1]}"
    return text[0].upper() + text[1:] + "."


def about_texts(dense: Numbers, here: Numbers) -> str:
    """Whether perplexity rose by more than NOTICED on either side, and whether one side's log
    perplexity rose UNEVEN times as much as the other's.
    """
    window = window_of(here)
    pair = [f"ppl_{side}_{window}" for side in ("in", "out")]
    known = [key for key in pair if key in here and key in dense]
    rises = [here[key] / dense[key] - 1 for key in known]
    if not rises:
        return ""
    if max(rises) <= NOTICED + 1e-9:
        return f"perplexity is within {NOTICED:.0%} of the dense model's"
    if len(rises) == 1:
        kind = "text of the calibration text's kind" if known == pair[:1] else "unseen text"
        return f"perplexity is {1 + rises[0]:.2f} times the dense model's on {kind}"
    seen, other = (max(math.log1p(rise), 0.0) for rise in rises)
    values = f"({1 + rises[1]:.2f} against {1 + rises[0]:.2f} times the dense perplexity)"
    if other > UNEVEN * seen:
        much = f"{other / seen:.1f} times as much as" if seen > 0.01 else "and not"
        return f"out-of-domain text suffers {much} the calibration text's domain {values}"
    if seen > UNEVEN * other:
        return f"the calibration text's own domain suffers most {values}"
    return f"text of all kinds suffers about alike {values}"


def about_answers(_: Numbers, here: Numbers) -> str:
    """Tasks whose accuracy changed by more than chance (McNemar's p below CHANCE); else how many
    answers flipped, from NOTICED on.
    """
    changed = {
        key.removeprefix("mcnemar_p_"): here.get(f"change_{key.removeprefix('mcnemar_p_')}", 0.0)
        for key, p in here.items()
        if key.startswith("mcnemar_p_") and p < CHANCE
    }
    if changed:
        worst = min(changed, key=lambda task: changed[task])
        more = f" (and {len(changed) - 1} more tasks)" if len(changed) > 1 else ""
        points = 100 * changed[worst]
        verb = "falls" if points < 0 else "rises"
        return f"accuracy {verb} by {abs(points):.0f} points on {worst}{more}"
    flips = here.get("flips_mean")
    if flips is None or flips < NOTICED:
        return ""
    return f"{flips:.0%} of the answers flipped though accuracy changed by no more than chance"


def about_writing(dense: Numbers, here: Numbers) -> str:
    """Loops, from LOOPING more than the dense model's on."""
    key = "loop_greedy"
    if key not in here or key not in dense or here[key] - dense[key] < LOOPING:
        return ""
    return f"{here[key]:.0%} of what it writes goes in loops (dense: {dense[key]:.0%})"


def sentences(table: ReportTable) -> Sequence[str]:
    """One line for each panel that has something to say."""
    return [f"{panel.label}: {panel.sentence}" for panel in panels(table) if panel.sentence]
