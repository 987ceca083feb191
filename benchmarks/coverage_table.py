"""The table of coverage.py: which kinds of units are right on which architecture, and why others are not."""

from __future__ import annotations

from typing import Any

KINDS = ("neurons", "heads", "hidden", "experts", "blocks", "inner")
TOGETHER = ("neurons", "heads", "hidden", "experts")
NO_HEADS = {"mamba", "falcon_mamba", "rwkv"}
NO_FFN = {"mamba", "mamba2", "falcon_mamba"}
LEGEND = """\
*proven (n)*: n groups, and removing random units of all of them at once gives the logits of zeroing them to 1e-4, with the exact number of
parameters and ties kept, and generation with a cache the same as without. *left alone*: reported by `report(model)` with that reason, not
pruned. *-*: the architecture has none. *generate*: tokens and logits with and without a cache after neurons, heads, hidden and experts were
pruned together; *n/a* where the unpruned model does not agree with itself or cannot generate.

Zeroing means: statistics over the kept channels. That is plain zeroing unless a norm, a softmax or a top-k runs over the units; and where a
class divides attention scores by the square root of a width that it reads off the tensor (Inkling 2), that width is the kept one. Blocks are
dropped one at a time; the last of its kind (the only attention block of a tiny hybrid) need not leave a cache that works.\
"""


def lacking(result: dict[str, Any], kind: str) -> list[str]:
    """Reasons why units of a kind were left alone."""
    return [line for line in result["left"] if line.split(":")[0].split(".")[0].split("_")[0] == kind]


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
    reason = next(iter(lacking(result, kind)), "not found").split(": ", 1)[-1][:90].replace("|", "/")
    return (f"proven ({c['groups']}), in part " if c else "") + f"left alone: {reason}"


def table(results: dict[str, dict[str, Any]]) -> str:
    built = {n: r for n, r in sorted(results.items()) if "kinds" in r}
    broken = {n: r for n, r in sorted(results.items()) if "kinds" not in r and "build" not in r}
    decoders = {n: r for n, r in built.items() if r["category"] == "decoder"}
    three = ("neurons", "heads", "hidden")

    def good(r: dict[str, Any], n: str) -> bool:
        return all(right(r, k) or not expected(n, r, k) for k in three)

    def share(some: dict[str, dict[str, Any]], kind: str) -> str:
        has = [n for n in some if expected(n, some[n], kind)]
        return f"{sum(right(some[n], kind) for n in has)} of {len(has)}"

    lines = ["# Coverage of discovery", "", "Made by `python benchmarks/coverage.py`; do not edit by hand.", ""]
    lines += ["| | decoder-only | all that can be built tiny |", "|---|---|---|"]
    lines += [f"| architectures | {len(decoders)} | {len(built)} |"]
    lines += [f"| {k} | {share(decoders, k)} | {share(built, k)} |" for k in KINDS[:5]]
    both = [sum(good(r, n) for n, r in some.items()) for some in (decoders, built)]
    lines += [f"| neurons, heads and hidden all right | {both[0]} of {len(decoders)} | {both[1]} of {len(built)} |"]
    same = [sum(r["generate"] == "same" for r in some.values()) for some in (decoders, built)]
    able = [sum(not r["generate"].startswith("n/a") for r in some.values()) for some in (decoders, built)]
    joint = [sum(correct(r["together"]) for r in some.values()) for some in (decoders, built)]
    lines += [f"| {', '.join(TOGETHER)}: those proven, removed together | {joint[0]} of {len(decoders)} | {joint[1]} of {len(built)} |"]
    lines += [f"| the same text with and without a cache after that | {same[0]} of {able[0]} | {same[1]} of {able[1]} |", ""]
    lines += [f"Code: {', '.join(sorted({r.get('code', 'unknown') for r in results.values()}))} (last commit of prunekit/graph).", ""]
    lines += [LEGEND, ""]
    lines += ["| architecture | class | " + " | ".join(KINDS) + " | generate | s |", "|" + "---|" * (len(KINDS) + 4)]
    for n, r in built.items():
        cells = [cell(n, r, k) for k in KINDS]
        lines.append(f"| {n} | {r['category']} | {' | '.join(cells)} | {r['generate']} | {r['seconds']:.1f} |")
    lines += ["", "## Not covered", ""]
    for n, r in built.items():
        for k in KINDS[:5]:
            if expected(n, r, k) and not right(r, k):
                lines.append(f"- {n}, {k}: {cell(n, r, k)}")
        if r["kinds"] and not correct(r["together"]):
            why = r["together"].get("error") or f"off by {r['together']['off']:.1e}, parameters exact: {r['together']['exact']}"
            lines.append(f"- {n}, kinds together: {why}")
        if not r["generate"].startswith(("same", "n/a")):
            lines.append(f"- {n}, generation with a cache after pruning: {r['generate']}")
    lines += [f"- {n}, everything: {r['error'][:200]}" for n, r in broken.items()]
    silent = [f"{n} ({r['uncached']})" for n, r in built.items() if r.get("uncached")]
    lines += ["", f"The cache is no part of the proofs, as the unpruned small model fails with it: {'; '.join(silent) or 'nowhere'}."]
    dead = [n for n, r in built.items() if any("never touched" in x for x in r["left"])]
    lines += [
        "",
        f"Parameters that a text-only run never touches (cross-attention, towers) are reported and left alone in: {', '.join(dead)}.",
        "",
    ]
    lines += ["Not built tiny: " + "; ".join(f"{n} ({r['build']})" for n, r in sorted(results.items()) if "build" in r) + ".", ""]
    slow = sorted(built, key=lambda n: -built[n]["seconds"])[:5]
    lines += [
        "Slowest: "
        + ", ".join(f"{n} {built[n]['seconds']:.0f} s" for n in slow)
        + " (discovery with proof, one core of a shared machine).",
        "",
    ]
    return "\n".join(lines)
