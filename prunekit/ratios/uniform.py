"""The same share of every group, or the same total wherever scores are lowest."""

from __future__ import annotations

from typing import Literal

from prunekit.errors import ConfigError
from prunekit.problem import Problem
from prunekit.registry import Positive, Share, ratios
from prunekit.selection.shares import Loadable, of_the_whole, uniform_counts
from prunekit.types import Allocation, Budget, Cut, Group, Of, Ranking


@ratios.register(paper="arXiv 2305.11627", year=2023)
def uniform(
    problem: Problem,
    groups: list[Group],
    *,
    target: Share = 0.2,
    of: Of = "model",
    ranking: Ranking = "local",
    budget: Budget | None = None,
    cut: Cut = "within",
    floor: Literal["kept", "removed"] = "kept",
    multiple: Positive = 1,
    per_kind: dict[str, Share] | None = None,
    loadable: Loadable = "any",
) -> Allocation:
    """Removes the share `target` of every group's units, of the prunable parameters, or of the
    whole model's parameters.

    Args:
        of: `units` follows LLM-Pruner's floor rule on channels: kept = floor(channels * (1 -
            target)), whole heads only. `prunable` and `model` solve for the share of units that
            removes `target` of those parameters, to within one unit. No group is emptied.
        ranking: `global` pools all groups, `kind` those of one kind: the total stays, counted as
            `budget` says, and goes wherever scores are lowest.
        budget: null counts units where `of` does, else parameters.
        cut: `nearest`, with ranking=global, cuts where what stays comes nearest to the total, as
            FLAP's code does; `within` never removes more than the total.
        floor: with of=units, what is rounded down: `removed` is FLAP's rule (UL-UM).
        multiple: kept neurons and residual channels are a multiple of this.
        per_kind: kinds of units with a share of their own, of units.
        loadable: `stock` takes the same counts in every layer, the nearest ones that transformers'
            own class can build; `deci` takes such as DeciLM's block configs hold, of a model like
            Llama: the same number of heads in every layer, feed-forward widths that are multiples
            of 256.

    Raises ConfigError when the target cannot be reached, and for a pooled ranking with options that
    it could not keep.
    """
    if ranking != "local" and (loadable != "any" or multiple > 1):
        raise ConfigError(
            f"ratio.ranking={ranking} moves units between groups, so that "
            f"ratio.loadable={loadable} and ratio.multiple={multiple} could not be kept; give "
            "ratio.ranking=local"
        )
    if cut == "nearest" and ranking != "global":
        raise ConfigError(
            f"ratio.cut=nearest cuts a ranking of all groups together: give ratio.ranking=global "
            f"(got {ranking})"
        )
    if floor == "removed" and of != "units":
        raise ConfigError(f"ratio.floor=removed rounds units: give ratio.of=units (got {of})")
    counts = uniform_counts(
        problem.model,
        groups,
        target,
        of,
        multiple=multiple,
        per_kind=per_kind,
        loadable=loadable,
        floor=floor,
    )
    if ranking != "local" and of == "units" and all(g.kind == "weights" for g in groups):
        counts = of_the_whole(groups, counts, (per_kind or {}).get("weights", target))
    unit: Budget = "units" if of == "units" else "parameters"
    return Allocation(counts, ranking, budget or unit, cut=cut)
