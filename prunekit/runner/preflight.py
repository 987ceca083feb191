"""Everything that can be known to be wrong before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from torch import nn

from prunekit import registry
from prunekit.checkpoint.construction import stock_class
from prunekit.errors import ConfigError, expanded
from prunekit.problem import Expected, Problem
from prunekit.registry import Component, checked_values
from prunekit.runner import tracking
from prunekit.runner.relations import (
    check_keys,
    check_lengths,
    check_samples,
    check_skip,
    check_streamed,
)
from prunekit.runner.resume import check_mode

STAGES = ("dense", "pruned", "recovered")
KEYS = ("model", "calib", "criterion", "ratio", "exclude", "pruner", "recovery", "eval")
"""What a configuration must have, besides `track`, `seed` and `save`."""


def existing_folder(path: str | None) -> str | None:
    """`path`, if it is null or a folder. Raises ValueError."""
    if path is not None and not expanded(path).is_dir():
        raise ValueError("it is not a folder")
    return path


TOP: dict[str, Any] = {
    "seed": registry.Seed,
    "save": Any,
    "objective": str | None,
    "cache": bool | Literal["on", "off"],
    "resume": Any,
    "data_root": Annotated[str | None, AfterValidator(existing_folder)],
    "out": str,
    "keep_stages": bool,
    "allow_nonfinite": bool,
    "deterministic": bool,
    "table": str | None,
    "row": str | None,
    "scale": str,
    "base": None,
    "rows": None,
    "scales": None,
}
"""Keys at the top that are no components, and their types. The last three are the sweep's, which
makes jobs of them.
"""


@dataclass(frozen=True)
class Components:
    """The components of one run, with checked options."""

    model: Component
    calib: Component
    criterion: Component | None
    ratio: Component | None
    exclude: Component
    pruner: Component
    recovery: Component | None
    evals: dict[str, Component]
    tokenizer: Any = None
    """Where the model component has it without weights."""
    expected: Expected | None = None
    """What the pruner's own check tells of its outcome."""


def check(cfg: dict[str, Any]) -> Components:
    """Builds every component, and asks whether they can work together on this model, judged by its
    shapes. Raises ConfigError.
    """
    check_top(cfg)
    parts = build_components(cfg)
    check_objective(cfg.get("objective"), bool(parts.recovery))
    check_mode(cfg)
    check_skip(parts.calib, parts.criterion, parts.pruner)
    check_samples(parts.calib, parts.pruner)
    check_keys(parts.evals)
    check_streamed(parts.model, parts.criterion, parts.pruner, parts.recovery)
    model, tokenizer = parts.model(meta=True)
    check_lengths(model, parts.calib, *parts.evals.values(), parts.recovery)
    if cfg["save"]:
        check_savable(model)
    expected = expected_outcome(parts, model)
    if parts.recovery and "check" in parts.recovery.meta:
        parts.recovery.meta["check"](model, **parts.recovery.options)
    return replace(parts, tokenizer=tokenizer, expected=expected)


def check_top(cfg: dict[str, Any]) -> None:
    """Raises ConfigError for what is missing at the top, unknown, or of another type."""
    missing = {*KEYS, "track", "seed", "save"} - cfg.keys()
    if missing:
        raise ConfigError(f"the config lacks {', '.join(sorted(missing))}")
    unknown = sorted(cfg.keys() - {*KEYS, "track", *TOP})
    if unknown:
        raise ConfigError(
            f"the config has no key {unknown[0]!r}; possible: {', '.join([*KEYS, 'track', *TOP])}"
        )
    if type(cfg["save"]) is not bool and cfg["save"] != "packed":
        raise ConfigError(
            f"save={cfg['save']!r}; possible: true, false, packed (zeros stored as a bitmask)"
        )
    checked_values("", {k: v for k, v in cfg.items() if k in TOP}, TOP)
    if not isinstance(cfg["track"], dict):
        raise ConfigError(f"track={cfg['track']!r} must be a mapping with a mode")
    checked_values("track", cfg["track"], tracking.OPTIONS)
    if not isinstance(cfg["eval"], dict | None):
        raise ConfigError(f"eval={cfg['eval']!r} must be a mapping: a name for each eval")
    if isinstance(alone := (cfg["eval"] or {}).get("name"), str):
        raise ConfigError(
            f"eval is one evaluation, {alone}, and must be a mapping of names to evaluations: "
            f"{{{alone!r}: {{'name': {alone!r}, ...}}}}"
        )
    for name, node in (cfg["eval"] or {}).items():
        if node is not None and not (isinstance(node, dict) and "name" in node):
            raise ConfigError(
                f"eval.{name}={node!r} must be a mapping with the name of an eval; there are: "
                f"{', '.join(registry.evals.names())}"
            )


def build_components(cfg: dict[str, Any]) -> Components:
    """Every component with checked options, as far as no model is needed.

    Raises ConfigError with what was given and what is possible.
    """
    parts = Components(
        registry.models.build(cfg["model"]),
        registry.calibs.build(cfg["calib"]),
        optional(registry.criteria, cfg["criterion"]),
        optional(registry.ratios, cfg["ratio"]),
        registry.excludes.build(cfg["exclude"]),
        registry.pruners.build(cfg["pruner"]),
        optional(registry.recoveries, cfg["recovery"]),
        {name: registry.evals.build(node) for name, node in (cfg["eval"] or {}).items() if node},
    )
    check_criterion(parts.criterion, parts.pruner)
    check_pruner(parts)
    check_search_text(parts)
    for evaluate in parts.evals.values():
        if "check" in evaluate.meta:
            evaluate.meta["check"](parts.calib, **evaluate.options)
    return parts


def optional(kind: registry.Registry, node: Any) -> Component | None:
    """None for `name: none`, which every optional kind has as a YAML."""
    empty = node is None or (isinstance(node, dict) and node.get("name") == "none")
    return None if empty else kind.build(node)


def check_objective(key: str | None, recovered: bool) -> None:
    """Raises ConfigError for an objective that no run could report, or this one without recovery
    could not.
    """
    stages = STAGES if recovered else STAGES[:2]
    if key is not None and key.partition("/")[0] not in stages:
        raise ConfigError(
            f"objective={key!r}; possible: a key of result.json's `results` that begins with "
            f"{', '.join(stages)}, such as pruned/ppl_pydocs_128"
        )


def check_savable(model: nn.Module) -> None:
    """Raises ConfigError where the checkpoint of this model could not be loaded again: better known
    before the work than after it.
    """
    try:
        stock_class(model)
    except ConfigError as e:
        raise ConfigError(f"save=true cannot be: {e}; or run with save=false") from e


def pruned_kinds(pruner: Component) -> tuple[str, ...]:
    """The kinds of units that a pruner takes, whatever chooses among them; empty if unknown."""
    return tuple(pruner.options.get("kinds") or pruner.meta.get("kinds", ()))


def check_criterion(criterion: Component | None, pruner: Component) -> None:
    """Raises ConfigError when `pruner` cannot use `criterion`, naming the criteria that it can."""
    name = criterion.name if criterion else "none"
    scored = pruner.meta.get("scored", False)
    if criterion and not scored:
        raise ConfigError(
            f"pruner={pruner.name} chooses by itself and cannot use criterion={name}; give "
            "criterion=none"
        )
    if criterion is None and scored is not True:
        return
    wanted = set(pruned_kinds(pruner))

    def usable(meta: dict[str, Any]) -> bool:
        return wanted <= set(meta.get("kinds", ()))

    if criterion is None or not usable(criterion.meta):
        entries = [registry.criteria.entry(n) for n in registry.criteria.names()]
        possible = ", ".join(e.name for e in entries if usable(e.meta))
        kinds = ", ".join(criterion.meta.get("kinds", ())) if criterion else ""
        own = f" (it scores {kinds})" if kinds else ""
        raise ConfigError(
            f"pruner={pruner.name} removes {', '.join(sorted(wanted))}, which criterion={name} "
            f"cannot score{own}; possible: {possible}"
        )


def check_pruner(parts: Components) -> None:
    """Raises ConfigError where the pruner cannot use the ratio or the text that it would get."""
    name = parts.pruner.name
    if parts.pruner.meta.get("own_ratio") and parts.ratio:
        raise ConfigError(
            f"pruner={name} decides by itself how much goes and cannot use "
            f"ratio={parts.ratio.name}; give ratio=none"
        )
    if parts.pruner.meta.get("several_texts") and not parts.calib.meta.get("several"):
        possible = ", ".join(
            n for n in registry.calibs.names() if registry.calibs.entry(n).meta.get("several")
        )
        raise ConfigError(
            f"pruner={name} meets one text after the other, calib={parts.calib.name} gives one; "
            f"possible: calib={possible}"
        )


def check_search_text(parts: Components) -> None:
    """Raises ConfigError where an eval reads the text by which the pruner searches: the file, or
    the split of a data set that both name.
    """
    if not parts.pruner.meta.get("searches"):
        return
    mine = _text(parts.calib.options)
    for name, evaluate in parts.evals.items():
        if mine and _text(evaluate.options) == mine:
            raise ConfigError(
                f"pruner={parts.pruner.name} searches by the calibration text, and eval {name} "
                f"reads the same one ({mine}): its number would flatter the result"
            )


def _text(options: dict[str, Any]) -> str | None:
    if options.get("path"):
        return str(Path(options["path"]).expanduser().resolve())
    return f"{options.get('dataset')}, {options['split']}" if options.get("split") else None


def expected_outcome(parts: Components, model: nn.Module) -> Expected | None:
    """What the pruner's own check tells of its outcome from shapes alone, on `model` on the meta
    device; None where it has no check. Raises ConfigError for what cannot be.
    """
    if "check" not in parts.pruner.meta:
        return None
    problem = Problem(model, criterion=parts.criterion, ratio=parts.ratio, exclude=parts.exclude)
    found: Expected = parts.pruner.meta["check"](problem, **parts.pruner.options)
    return found
