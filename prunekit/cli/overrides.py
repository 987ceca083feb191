"""Overrides whose keys the chosen YAMLs do not have: told with better messages than Hydra's."""

from __future__ import annotations

from typing import Any

from prunekit.cli.paths import composing
from prunekit.cli.suggestions import chosen_wrong, has, key_wrong, kinds, yaml_names
from prunekit.errors import ConfigError


def check_keys(args: list[str]) -> None:
    """Raises ConfigError for an override of a key that the chosen YAMLs do not have, naming those
    they do.
    """
    overrides, groups = parsed(args), {*kinds(), "hydra"}
    choices = [o for o in overrides if o.key_or_group in groups]
    for o in choices:
        check_choice(o)
    cfg = chosen_yamls(choices, groups)
    check_table_words(overrides, cfg)
    check_evals(cfg["eval"])
    for o in overrides:
        if (
            o.key_or_group in groups
            or o.is_add()
            or o.is_force_add()
            or o.is_delete()
            or o.key_or_group.startswith("hydra")
        ):
            continue
        check_path(cfg, o.key_or_group)


def parsed(args: list[str]) -> list[Any]:
    """The overrides among the arguments, in Hydra's form. Raises ConfigError where its grammar does
    not take them.
    """
    from hydra.errors import HydraException

    from prunekit.runner import sweep

    try:
        return list(sweep.parse(words_of(args)))
    except HydraException as e:
        raise ConfigError(
            f"{str(e).splitlines()[0]}\n  hint: an override is key=value; what has commas, braces "
            "or spaces is quoted: \"key='a b'\""
        ) from None


def chosen_yamls(choices: list[Any], groups: set[str]) -> Any:
    """The unresolved configuration of the YAMLs that the overrides `choices` name, of a list the
    first; an experiment's own choices count as if they were typed. Raises ConfigError.
    """
    from hydra import compose
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    words = [
        f"{o.key_or_group if o.is_delete() else o.get_key_element()}={first_value(o)}"
        for o in choices
    ]
    typed = {o.key_or_group for o in choices}
    try:
        with composing():
            cfg: Any = OmegaConf.to_container(compose("config", overrides=words), resolve=False)
            base = (cfg["base"] or {}).items()
            own = [f"{k}={v}" for k, v in base if k in groups and k not in typed]
            if own:
                whole = compose("config", overrides=[*words, *own])
                cfg = OmegaConf.to_container(whole, resolve=False)
    except HydraException as e:
        raise ConfigError(two_lines(e)) from None
    return cfg


def check_choice(override: Any) -> None:
    """Raises ConfigError for a component or an experiment that has no YAML."""
    group, value = override.key_or_group, first_value(override)
    if override.is_delete() or group == "hydra" or (group == "experiment" and value is None):
        return
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or str(name).removesuffix(".yaml") not in yaml_names(group):
            raise ConfigError(chosen_wrong(group, name))
    # Hydra would lay one over the other: the last one's name with options of all.
    single = [n for n in names if group != "eval" or has(group, n.removesuffix(".yaml"), "name")]
    if len(names) > 1 and single:
        several = " ".join(f"+eval@eval.{n}={n}" for n in names)
        hint = (
            f"suites can be listed, evaluations are put beside each other: eval=none {several}"
            if group == "eval"
            else f"-m {group}={','.join(names)} runs one after the other"
        )
        raise ConfigError(
            f"{override.input_line} lists {len(names)}, and one can be chosen\n  hint: {hint}"
        )


def words_of(args: list[str]) -> list[str]:
    """The overrides among the arguments, without flags and their values."""
    return [a for a in args if not a.startswith("-") and ("=" in a or a.startswith("~"))]


def refuse_flags(args: list[str], possible: str, known: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for a flag that a command does not have; `possible` says what it takes."""
    for word in args:
        if word.startswith("-") and word not in known:
            raise ConfigError(f"no flag {word!r} here; possible: {possible}")


def check_table_words(overrides: list[Any], cfg: Any) -> None:
    """Raises ConfigError for words that choose a part of an experiment where there is none."""
    typed = {o.key_or_group: o for o in overrides}
    for key, place in (("row", "rows"), ("scale", "scales"), ("table", "table")):
        if key in typed and cfg[place] is None and first_value(typed[key]) not in ("full", None):
            raise ConfigError(
                f"{key}=... is for the table of an experiment, and there is none: give "
                "experiment=..."
            )


def check_evals(evals: Any) -> None:
    """Raises ConfigError for an evaluation beside one that was chosen alone, and for options under
    a name that has no evaluation.
    """
    if not isinstance(evals, dict):
        return
    if isinstance(alone := evals.get("name"), str):
        for name, node in evals.items():
            if isinstance(node, dict) and isinstance(node.get("name"), str):
                raise ConfigError(
                    f"eval={alone} is one evaluation alone, and eval.{name} stands beside it\n  "
                    f"hint: eval=none +eval@eval.{alone}={alone} +eval@eval.{name}={node['name']} "
                    "measures both"
                )
        return
    for name, node in evals.items():
        if isinstance(node, dict) and not node.get("name"):
            there = ", ".join(k for k, v in evals.items() if v and v is not node) or "none"
            raise ConfigError(
                f"eval.{name} has options but no evaluation; there are: {there}\n  hint: "
                f"+eval@eval.{name}=perplexity makes it one"
            )


def check_composition(args: list[str]) -> None:
    """Raises ConfigError for what Hydra would refuse of a single run: values that it cannot set,
    interpolations that lead nowhere, lists of values. The jobs of a sweep are composed there.
    """
    from hydra import compose
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    overrides = parsed(args)
    swept = next((o for o in overrides if o.is_sweep_override()), None)
    words = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    sweep = bool({"-m", "--multirun"} & set(args))
    try:
        with composing():
            cfg = compose("config", overrides=words, return_hydra_config=True)
            if sweep or str(cfg.hydra.mode).endswith("MULTIRUN"):
                return
            check_sweeps_keys(cfg)
            if swept is not None:
                raise ConfigError(
                    f"{swept.input_line} is a list of values\n  hint: -m runs all of them; one "
                    "value with commas is quoted: \"key='a,b'\""
                )
            with open_dict(cfg):
                del cfg["hydra"], cfg["out"]
            whole: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            check_evals(whole["eval"])
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(two_lines(e)) from None


def check_sweeps_keys(cfg: Any) -> None:
    """Raises ConfigError for what makes jobs of a sweep where there is one job."""
    for key in ("base", "rows", "scales"):
        if cfg.get(key) is not None:
            raise ConfigError(
                f"{key}=... is for the jobs of a sweep, and this is a single run\n  hint: -m makes "
                "a sweep of it; what is meant for one run is typed by itself: key=value"
            )


def two_lines(error: Exception) -> str:
    """What Hydra or OmegaConf says, on one line, and what helps on another."""
    where = getattr(error, "full_key", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and not str(error).strip():
        lines = str(cause).splitlines()
    what = lines[0] if lines else type(error).__name__
    return (
        f"{where + ': ' if where else ''}{what}\n  hint: `prunekit --cfg job` shows the "
        "configuration; +key=value adds a key, and ${key} names one that there is"
    )


def first_value(override: Any) -> Any:
    """Of a list of values the first one."""
    return (
        next(iter(override.sweep_string_iterator()))
        if override.is_sweep_override()
        else override.value()
    )


def check_path(cfg: Any, path: str) -> None:
    """Raises ConfigError at the first step of `path` that `cfg` lacks."""
    node: Any = cfg
    walked: list[str] = []
    for step in path.split("."):
        if not isinstance(node, dict) or step not in node:
            where = ".".join(walked) or "the config"
            chosen = f" ({node['name']})" if isinstance(node, dict) and "name" in node else ""
            possible = ", ".join(k for k in node if k != "name") if isinstance(node, dict) else ""
            raise ConfigError(
                f"{where}{chosen} has no key {step!r}; possible: {possible or 'none'}"
                + key_wrong(cfg, path, step, node)
            )
        node, walked = node[step], [*walked, step]
