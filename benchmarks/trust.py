"""Tables of the experiments on trust, from the folders that their sweeps left:

python benchmarks/trust.py essential outputs/trust/essential_sparsity-small
python benchmarks/trust.py kick outputs/trust/kick-small
python benchmarks/trust.py junk outputs/trust/junk_dna-small
python benchmarks/trust.py ranks outputs/trust/methods-small
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping

from prunekit.report.load import Result, load
from prunekit.report.matching import drop, drop_point, knee, matches, next_sparsity, spearman

BETTER = {"ppl_": -1, "kl_": -1, "flips_": -1, "loop_": -1}
"""How the keys begin of which less is better."""
SUBSTITUTES = (
    "LLM-KICK in little, without its data and its judge: 40 questions of ours, closed and open "
    "book, for FreebaseQA and TriviaQA; ARC for MMLU; ROUGE-L with the dense model's answers and "
    "unique tokens for the GPT-4 scores of MT-Bench and CNN/DailyMail"
)
DOMAINS = {"web": "c4", "articles": "wikitext2", "dialogue": "dialogue"}
"""Text that an arm of Junk DNA learns -> the text that it is tested on."""


def better(key: str) -> int:
    return next((sign for start, sign in BETTER.items() if key.startswith(start)), 1)


def stage_of(result: Result) -> dict[str, float | None]:
    """The numbers at the end of a job."""
    return result.numbers.get("recovered", result.numbers["pruned"])


def target(result: Result) -> float:
    return float(result.config["ratio"]["target"])


def by_row(results: Iterable[Result]) -> dict[str, list[Result]]:
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(str(result.config["row"]), []).append(result)
    return rows


def curve_of(results: list[Result], key: str) -> dict[float, float]:
    """Quality by sparsity, with the dense model's at 0 unless a job says what it is there."""
    dense = results[0].numbers["dense"].get(key)
    found = {0.0: dense} | {target(r): stage_of(r).get(key) for r in results}
    return {s: v for s, v in sorted(found.items()) if v is not None}


def quality_keys(results: list[Result], starts: tuple[str, ...]) -> list[str]:
    keys = dict.fromkeys(k for r in results for k in stage_of(r))
    return [
        k
        for k in keys
        if k.startswith(starts) and not k.endswith(("_stderr", "_to_dense")) and "_gap_" not in k
    ]


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:+.0f} %"


def scaled(key: str, curve: Mapping[float, float]) -> dict[float, float]:
    """Perplexities by their logarithm: else the last ones, of a million, are all that is seen."""
    return {s: math.log(v) if key.startswith("ppl_") else v for s, v in curve.items()}


def essential(results: list[Result]) -> str:
    """Drop points at 1 % and 5 %, knees, and where bisection would look next."""
    lines = []
    for row, own in by_row(results).items():
        for key in quality_keys(own, ("ppl_", "acc_", "top1_")):
            curve = curve_of(own, key)
            sign = better(key)
            following = next_sparsity(curve, sign)
            values = ", ".join(f"{s:.4g}: {v:.4g}" for s, v in curve.items())
            points = [f"{drop_point(curve, sign, share):.3g}" for share in (0.01, 0.05)]
            around = "-" if following is None else f"{following:.4g}"
            lines.append([row, key, *points, f"{knee(scaled(key, curve)):.3g}", around, values])
    heads = ["masks", "metric", "drop point 1 %", "5 %", "knee", "bisect at", "curve"]
    return table(heads, lines)


def kick(results: list[Result]) -> str:
    """What each method loses of each task at each sparsity, and the largest that matches."""
    rows = by_row(results)
    keys = quality_keys(results, ("ppl_in", "ppl_out", "acc_", "rouge_l", "unique_tokens_greedy"))
    keys = [k for k in keys if k != "acc_mean"]
    lines = []
    for row, own in rows.items():
        for result in sorted(own, key=target):
            cells = []
            for key in keys:
                # the dense model agrees with itself
                dense, here = result.numbers["dense"].get(key), stage_of(result).get(key)
                if dense is None or here is None:
                    cells.append("-")
                    continue
                sign = better(key)
                mark = "" if matches(dense, here, sign) else " ✗"
                cells.append(f"{here:.3g} ({percent(-drop(dense, here, sign))}){mark}")
            lines.append([f"{row} {target(result):.0%}", *cells])
        best = []
        for key in keys:
            curve = curve_of(own, key)
            best.append(f"**{drop_point(curve, better(key)):.0%}**" if len(curve) > 1 else "-")
        lines.append([f"**{row}: largest matching**", *best])
    dense = results[0].numbers["dense"]
    lines.insert(0, ["dense", *[f"{dense[key]:.3g}" for key in keys]])
    return f"**{SUBSTITUTES}.**\n\n" + table(["method", *keys], lines)


def junk(results: list[Result]) -> str:
    """What each arm loses on the text that it learnt, beside the arm that lost nothing; and whether
    what is difficult loses more.
    """
    found: dict[tuple[str, str, float], tuple[float, float]] = {}
    for row, own in by_row(results).items():
        arm, _, domain = row.partition(" ")
        for result in own:
            prefix = f"ppl_{DOMAINS[domain]}_"
            numbers = stage_of(result)
            key = next(k for k in numbers if k.startswith(prefix) and not k.endswith("_to_dense"))
            values = numbers[key], result.numbers["dense"][key]
            if values[0] is not None and values[1] is not None:
                found[arm, domain, target(result)] = (values[0], values[1])
    lines, difficulty, lost = [], [], []
    for domain in DOMAINS:
        whole = found.get(("sparse", domain, 0.0))
        for share in sorted({s for _, d, s in found if d == domain and s > 0}):
            drops = {
                arm: drop(whole[0], found[arm, domain, share][0], -1)
                for arm in ("sparse", "frozen", "dense")
                if whole and (arm, domain, share) in found
            }
            if "sparse" not in drops or whole is None:
                continue
            difficulty.append(whole[1])
            lost.append(drops["sparse"])
            small, back = (
                drops["sparse"] - drops[arm] if arm in drops else None
                for arm in ("frozen", "dense")
            )
            cells = [percent(drops.get(arm)) for arm in ("sparse", "frozen", "dense")]
            head = [domain, f"{whole[1]:.1f}", f"{whole[0]:.1f}", f"{share:.0%}"]
            lines.append([*head, *cells, percent(small), percent(back)])
    rho, p = spearman(difficulty, lost)
    heads = ["text", "dense ppl (difficulty)", "fine-tuned", "removed", "sparse", "frozen", "dense"]
    heads += ["value of small weights", "recovered by training zeros"]
    return table(heads, lines) + (
        f"\nSpearman of difficulty and the sparse arm's loss: {rho:.2f} (p {p:.2g}, "
        f"{len(lost)} pairs)\n"
    )


def ranks(results: list[Result]) -> str:
    """Methods at each ratio with their ranks by perplexity and by fidelity, and the pairs that the
    two order differently.
    """
    keys = quality_keys(results, ("ppl_in", "ppl_out", "kl_in", "kl_out", "top1_out", "flips_mean"))
    keys += quality_keys(results, ("acc_mean", "rouge_l", "loop_greedy"))
    text = ""
    for share in sorted({target(r) for r in results}):
        own = [r for r in results if target(r) == share]
        order = {
            key: {id(r): i + 1 for i, r in enumerate(sorted(own, key=sorting(key)))} for key in keys
        }
        lines = []
        for r in sorted(own, key=sorting(keys[0])):
            values = {k: stage_of(r).get(k) for k in keys}
            cells = [
                "-" if v is None else f"{v:.4g} ({order[k][id(r)]})" for k, v in values.items()
            ]
            lines.append([str(r.config["row"]), *cells])
        text += f"\n**{share:.0%} removed** (rank)\n\n" + table(["method", *keys], lines)
        for key in keys[1:]:
            pairs = [
                f"{a.config['row']} / {b.config['row']}"
                for i, a in enumerate(own)
                for b in own[i + 1 :]
                if (order[keys[0]][id(a)] < order[keys[0]][id(b)])
                != (order[key][id(a)] < order[key][id(b)])
            ]
            text += f"\n- ordered differently by {keys[0]} and {key}: {', '.join(pairs) or 'none'}"
        text += "\n"
    return text


def sorting(key: str) -> Callable[[Result], float]:
    def value(result: Result) -> float:
        found = stage_of(result).get(key)
        return math.inf if found is None else -better(key) * found

    return value


COMMANDS = {"essential": essential, "kick": kick, "junk": junk, "ranks": ranks}

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: trust.py {'|'.join(COMMANDS)} DIR...")
    print(COMMANDS[sys.argv[1]](load(sys.argv[2:]).results))
