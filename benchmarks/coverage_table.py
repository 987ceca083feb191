"""The table of coverage.py: which kinds of units are right on which architecture, and why others
are not.
"""

from __future__ import annotations

from typing import Any

KINDS = ("neurons", "heads", "hidden", "experts", "blocks", "inner")
TOGETHER = ("neurons", "heads", "hidden", "experts")
NO_HEADS = {"mamba", "falcon_mamba", "rwkv"}
NO_FFN = {"mamba", "mamba2", "falcon_mamba"}
LEGEND = """\
*proven (n)*: n groups, and removing random units of all of them at once gives the logits of
zeroing them to 1e-4, with the exact number of parameters and ties kept, and generation with a
cache the same as without. *left alone*: reported by `report(model)` with that reason, not pruned.
*-*: the architecture has none. *generate*: tokens and logits with and without a cache after
neurons, heads, hidden and experts were pruned together; *n/a* where the unpruned model does not
agree with itself or cannot generate.

Zeroing means: statistics over the kept channels. That is plain zeroing unless a norm, a softmax
or a top-k runs over the units; and where a class divides attention scores by the square root of a
width that it reads off the tensor (Inkling 2), that width is the kept one. Blocks are dropped one
at a time; the last of its kind (the only attention block of a tiny hybrid) need not leave a cache
that works.\
"""


def lacking(result: dict[str, Any], kind: str) -> list[str]:
    """Reasons why units of a kind were left alone."""
    return [
        line for line in result["left"] if line.split(":")[0].split(".")[0].split("_")[0] == kind
    ]


def correct(c: dict[str, Any]) -> bool:
    return bool(c["off"] < 1e-4 and c["moved"] > 1e-3 and c["exact"] and c["tied"])


def right(result: dict[str, Any], kind: str) -> bool:
    return kind in result["kinds"] and correct(result["kinds"][kind]) and not lacking(result, kind)


def expected(name: str, result: dict[str, Any], kind: str) -> bool:
    if kind == "experts":
        return result["moe"]
    return not (kind == "heads" and name in NO_HEADS or kind == "neurons" and name in NO_FFN)


def cell(name: str, result: dict[str, Any], kind: str) -> str:
    c = result["kinds"].get(kind)
    if kind == "inner" and not c:
        return ""
    if not expected(name, result, kind):
        return "-"
    if right(result, kind):
        return f"proven ({c['groups']})"
    if c and not (c["off"] < 1e-4 and c["exact"] and c["tied"]):
        return f"**wrong** ({c.get('error') or format(c['off'], '.1e')})"
    if c and c["moved"] <= 1e-3:
        return f"vacuous here ({c['groups']})"
    reason = (
        next(iter(lacking(result, kind)), "not found").split(": ", 1)[-1][:90].replace("|", "/")
    )
    return (f"proven ({c['groups']}), in part " if c else "") + f"left alone: {reason}"


Results = dict[str, dict[str, Any]]


def table(results: Results) -> str:
    built = {n: r for n, r in sorted(results.items()) if "kinds" in r}
    codes = ", ".join(sorted({r.get("code", "unknown") for r in results.values()}))
    slow = ", ".join(
        f"{n} {built[n]['seconds']:.0f} s"
        for n in sorted(built, key=lambda n: -built[n]["seconds"])[:5]
    )
    lines = [
        "# Coverage of discovery",
        "",
        "Made by `python benchmarks/coverage.py`; do not edit by hand.",
        "",
    ]
    lines += [*totals(built), "", f"Code: {codes} (last commit of prunekit/graph).", "", LEGEND, ""]
    lines += [
        "| architecture | class | " + " | ".join(KINDS) + " | generate | s |",
        "|" + "---|" * (len(KINDS) + 4),
    ]
    for n, r in built.items():
        cells = [cell(n, r, k) for k in KINDS]
        lines.append(
            f"| {n} | {r['category']} | {' | '.join(cells)} | {r['generate']} | "
            f"{r['seconds']:.1f} |"
        )
    lines += ["", "## Not covered", "", *missing(results, built), ""]
    return "\n".join(
        [*lines, f"Slowest: {slow} (discovery with proof, one core of a shared machine).", ""]
    )


def totals(built: Results) -> list[str]:
    """How many architectures are right, kind by kind and in all: decoder-only ones, and all."""
    both = [{n: r for n, r in built.items() if r["category"] == "decoder"}, built]

    def row(label: str, counts: list[tuple[int, int]]) -> str:
        return f"| {label} | {' | '.join(f'{yes} of {all_}' for yes, all_ in counts)} |"

    lines = [
        "| | decoder-only | all that can be built tiny |",
        "|---|---|---|",
        f"| architectures | {len(both[0])} | {len(both[1])} |",
    ]
    for k in KINDS[:5]:
        has = [[n for n in some if expected(n, some[n], k)] for some in both]
        lines.append(
            row(k, [(sum(right(built[n], k) for n in names), len(names)) for names in has])
        )
    good = {
        n
        for n, r in built.items()
        if all(right(r, k) or not expected(n, r, k) for k in ("neurons", "heads", "hidden"))
    }
    lines.append(
        row(
            "neurons, heads and hidden all right",
            [(len(good & set(some)), len(some)) for some in both],
        )
    )
    joint = [(sum(correct(r["together"]) for r in some.values()), len(some)) for some in both]
    lines.append(row(f"{', '.join(TOGETHER)}: those proven, removed together", joint))
    able = [[r for r in some.values() if not r["generate"].startswith("n/a")] for some in both]
    same = [(sum(r["generate"] == "same" for r in some), len(some)) for some in able]
    return [*lines, row("the same text with and without a cache after that", same)]


def missing(results: Results, built: Results) -> list[str]:
    """What is not covered, line by line, with the reasons."""
    lines = []
    for n, r in built.items():
        lines += [
            f"- {n}, {k}: {cell(n, r, k)}"
            for k in KINDS[:5]
            if expected(n, r, k) and not right(r, k)
        ]
        if r["kinds"] and not correct(r["together"]):
            why = (
                r["together"].get("error")
                or f"off by {r['together']['off']:.1e}, parameters exact: {r['together']['exact']}"
            )
            lines.append(f"- {n}, kinds together: {why}")
        if not r["generate"].startswith(("same", "n/a")):
            lines.append(f"- {n}, generation with a cache after pruning: {r['generate']}")
    lines += [
        f"- {n}, everything: {r['error'][:200]}"
        for n, r in sorted(results.items())
        if "kinds" not in r and "build" not in r
    ]
    silent = [f"{n} ({r['uncached']})" for n, r in built.items() if r.get("uncached")]
    dead = [n for n, r in built.items() if any("never touched" in x for x in r["left"])]
    unbuilt = [f"{n} ({r['build']})" for n, r in sorted(results.items()) if "build" in r]
    return [
        *lines,
        "",
        "The cache is no part of the proofs, as the unpruned small model fails with it: "
        f"{'; '.join(silent) or 'nowhere'}.",
        "",
        "Parameters that a text-only run never touches (cross-attention, towers) are reported "
        f"and left alone in: {', '.join(dead)}.",
        "",
        f"Not built tiny: {'; '.join(unbuilt)}.",
    ]
