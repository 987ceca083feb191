"""Everything that can be known to be wrong before a weight is read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from prunekit import registry
from prunekit.checkpoint.layout import stock_class
from prunekit.errors import ConfigError
from prunekit.selection.eligible import entered
from prunekit.types import Group

log = logging.getLogger("prunekit")


@dataclass
class Parts:
    """The built components of one run."""

    model: partial[Any]
    calib: partial[Any]
    criterion: partial[Any] | None
    ratio: partial[Any]
    exclude: partial[Any]
    pruner: partial[Any]
    recovery: partial[Any] | None
    evals: dict[str, partial[Any]]


def check(cfg: dict[str, Any]) -> Parts:
    """Builds every part, and asks whether they can work together on this model.
    Raises ConfigError.
    """
    parts = built(cfg)
    model, _ = parts.model(meta=True)
    if cfg["save"]:
        savable(model)
    leaves_something(parts, cfg, model)
    within_reach(parts, cfg, model)
    return parts


def savable(model: nn.Module) -> None:
    """Raises ConfigError where the checkpoint of this model could not be loaded again: better known
    before the work than after it.
    """
    try:
        stock_class(model)
    except ConfigError as e:
        raise ConfigError(f"save=true cannot be: {e}; or run with save=false") from e


def built(cfg: dict[str, Any]) -> Parts:
    """Every part with checked options, as far as no model is needed. Raises ConfigError with what
    was given and what is possible.
    """
    missing = {
        "model",
        "calib",
        "criterion",
        "ratio",
        "exclude",
        "pruner",
        "recovery",
        "eval",
        "track",
        "seed",
        "save",
    } - cfg.keys()
    if missing:
        raise ConfigError(f"the config lacks {', '.join(sorted(missing))}")
    if cfg["save"] not in (True, False, "packed"):
        raise ConfigError(
            f"save={cfg['save']!r}; possible: true, false, packed (zeros stored as a bitmask)"
        )
    parts = Parts(
        registry.models.build(cfg["model"]),
        registry.calibs.build(cfg["calib"]),
        optional(registry.criteria, cfg["criterion"]),
        registry.ratios.build(cfg["ratio"]),
        registry.excludes.build(cfg["exclude"]),
        registry.pruners.build(cfg["pruner"]),
        optional(registry.recoveries, cfg["recovery"]),
        {name: registry.evals.build(node) for name, node in (cfg["eval"] or {}).items() if node},
    )
    fitting(
        cfg["criterion"]["name"] if parts.criterion else "none",
        cfg["pruner"]["name"],
        parts.pruner.keywords,
    )
    return parts


def optional(kind: registry.Registry, node: Any) -> partial[Any] | None:
    """None for `name: none`, which every optional kind has as a YAML."""
    return None if node is None or node.get("name") == "none" else kind.build(node)


def pruned_kinds(pruner: str, options: dict[str, Any]) -> tuple[str, ...]:
    """The kinds of units that a pruner asks its criterion to score; empty if it
    chooses by itself.
    """
    entry = registry.pruners.entry(pruner)
    kinds: Any = entry.meta.get("kinds", ())
    return (
        tuple(options.get("kinds") or entry.defaults["kinds"])
        if kinds == "option"
        else tuple(kinds)
    )


def fitting(criterion: str, pruner: str, options: dict[str, Any]) -> None:
    """Raises ConfigError when `pruner` cannot use `criterion`, naming the criteria that it can."""
    wanted = pruned_kinds(pruner, options)

    def usable(name: str) -> bool:
        return set(wanted) <= set(registry.criteria.entry(name).meta.get("kinds", ()))

    if not wanted:
        if criterion != "none":
            raise ConfigError(
                f"pruner={pruner} chooses by itself and cannot use criterion={criterion}; give "
                "criterion=none"
            )
    elif criterion == "none" or not usable(criterion):
        possible = [n for n in registry.criteria.names() if usable(n)]
        raise ConfigError(
            f"pruner={pruner} removes {', '.join(wanted)}, which criterion={criterion} cannot "
            f"score; possible: {', '.join(possible)}"
        )


def within_reach(parts: Parts, cfg: dict[str, Any], model: nn.Module) -> None:
    """Raises ConfigError when the model lacks a kind of unit or the ratio cannot be met, as far as
    shapes decide.

    Half a second for a model of any size. Pruners that choose by themselves and ratios that need
    data are left to the run.
    """
    kinds = pruned_kinds(cfg["pruner"]["name"], parts.pruner.keywords)
    if kinds and registry.ratios.entry(cfg["ratio"]["name"]).meta.get("needs", "-") == "-":
        groups = entered(model, kinds, parts.exclude, parts.pruner.keywords.get("targets"))
        parts.ratio(model, groups, None)


def leaves_something(parts: Parts, cfg: dict[str, Any], model: nn.Module) -> None:
    """Raises ConfigError when the exclusion leaves nothing, judged on an outline of the model made
    from its config alone.
    """
    config: Any = model.config
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if depth is None:
        return  # an unusual config: the pruner checks again on the real groups
    outline = [
        Group(f"{kind}.{i}", kind, i, 1) for kind in ("heads", "neurons") for i in range(depth)
    ]
    outline += [
        Group("hidden", "hidden", None, 1),
        Group("blocks", "blocks", None, depth, modules=tuple(str(i) for i in range(depth))),
    ]
    wanted = set(pruned_kinds(cfg["pruner"]["name"], parts.pruner.keywords)) or {"heads", "neurons"}
    outline = [g for g in outline if g.kind in wanted] or outline
    exclude: Callable[[list[Group]], list[Group]] = parts.exclude
    if not exclude(outline):
        options = ", ".join(f"{k}={v}" for k, v in parts.exclude.keywords.items())
        raise ConfigError(
            f"exclude={cfg['exclude']['name']} ({options}) leaves nothing of the model's {depth} "
            "blocks"
        )
