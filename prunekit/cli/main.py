"""The console script: Hydra overrides run an experiment; a first word without `=`
names a command.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

COMMANDS = {
    "export": (
        "prunekit.checkpoint.gguf",
        "export PATH --gguf FILE [--type f32|f16|q8_0]: a stock checkpoint as one GGUF file",
    ),
    "groups": (
        "prunekit.inventory.command",
        "groups [OVERRIDE ...] [--json] [--all] [--to FILE]: what goes together in a model, as "
        "tree, JSON or picture",
    ),
    "list": (
        "prunekit.cli.list",
        "list [KIND]: every registered component, its options, one line each",
    ),
    "plan": (
        "prunekit.cli.plan",
        "plan [OVERRIDE ...]: sizes, MACs and memory that a run would leave; no weights are read",
    ),
    "report": (
        "prunekit.report.command",
        "report DIR... [--to FILE]: the results below DIR as tables and plots, the paper's "
        "numbers beside them",
    ),
}
"""command -> (module with `main(argv) -> int`, help line)."""

USAGE = """prunekit [OVERRIDE ...]            one experiment: e.g. criterion=l2 ratio.target=0.3 recovery=lora
prunekit -m [OVERRIDE ...]         a sweep: e.g. ratio.target=0.1,0.2,0.3 criterion=taylor,random
prunekit experiment=llm_pruner/table6   all rows of a paper's table; scale=small: in little; a,b: one table after the other
prunekit --cfg job [OVERRIDE ...]  the composed configuration, nothing run
"""  # noqa: E501  (a table)


def conf_dir() -> Path:
    """The YAML folder: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 fine, 1 a job failed, 2 what was asked for cannot be."""
    args = sys.argv[1:] if argv is None else argv
    if args and args[0] in ("-h", "--help", "help"):
        print(USAGE + "\n".join(f"prunekit {line}" for _, line in COMMANDS.values()))
        return 0
    from prunekit.errors import ConfigError

    try:
        if args and args[0] in COMMANDS:
            return importlib.import_module(COMMANDS[args[0]][0]).main(args[1:])
        for before, word in zip(["", *args], args):
            # A flag of Hydra may be followed by its value: --cfg job.
            if (
                "=" not in word
                and not word.startswith(("-", "~"))
                and (not before.startswith("-") or before in ("-m", "--multirun"))
            ):
                raise ConfigError(
                    f"no command {word!r}; there are: {', '.join(COMMANDS)}, or overrides such as "
                    "ratio.target=0.3"
                )
        return max([launch(words) for words in one_experiment_each(args)])
    except ConfigError as e:
        print(f"prunekit: {e}", file=sys.stderr)
        return 2


def one_experiment_each(args: list[str]) -> list[list[str]]:
    """`experiment=a,b` is two tables, each with rows and a folder of its own: a list of arguments
    for each.
    """
    for i, word in enumerate(args):
        key, _, value = word.partition("=")
        if key == "experiment" and "," in value:
            return [
                [*args[:i], f"experiment={v.strip()}", *args[i + 1 :]] for v in value.split(",")
            ]
    return [args]


def launch(args: list[str]) -> int:
    """Hand the overrides to Hydra, after a look at their keys that gives better messages than
    Hydra's.
    """
    import hydra
    from hydra.core.plugins import Plugins

    from hydra_plugins.prunekit_sweeper.sweeper import TableSweeper

    known_keys(args)
    failures: list[str] = []

    def job(cfg: Any) -> float | None:
        from prunekit.runner.job import run_job, settled

        return run_job(settled(cfg), failures)

    # The sweeper adds the jobs that ended badly. Hydra finds it by itself but for editable
    # installs, whose namespace it cannot list.
    job.failures = failures  # type: ignore[attr-defined]
    Plugins.instance().register(TableSweeper)

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    before, sys.argv = sys.argv, [sys.argv[0], *args]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    finally:
        sys.argv = before
    for line in failures:
        print(line, file=sys.stderr)
    return 2 if any("ConfigError" in f for f in failures) else bool(failures)


def known_keys(args: list[str]) -> None:
    """Raises ConfigError for an override of a key that the chosen YAMLs do not have, naming those
    they do.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    from prunekit.errors import ConfigError

    words = [a for a in args if not a.startswith("-") and "=" in a]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException as e:
        raise ConfigError(f"cannot read the overrides {words}: {e}") from None
    groups = {p.name for p in conf_dir().iterdir() if p.is_dir()}
    choices = [o for o in overrides if o.key_or_group in groups]
    first = [f"{o.key_or_group}={first_value(o)}" for o in choices]
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg: Any = OmegaConf.to_container(compose("config", overrides=first), resolve=False)
            chosen = {o.key_or_group for o in choices}
            # An experiment's own choices count as if they were typed.
            own = [
                f"{k}={v}"
                for k, v in (cfg["base"] or {}).items()
                if k in groups and k not in chosen
            ]
            if own:
                cfg = OmegaConf.to_container(
                    compose("config", overrides=[*first, *own]), resolve=False
                )
    except HydraException as e:
        raise ConfigError(
            str(e).split("\n\n")[0] if "Could not find" not in str(e) else not_found(e)
        ) from None
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


def first_value(override: Any) -> Any:
    """Of a list of values the first one."""
    return (
        next(iter(override.sweep_string_iterator()))
        if override.is_sweep_override()
        else override.value()
    )


def check_path(cfg: Any, path: str) -> None:
    """Raises ConfigError at the first step of `path` that `cfg` lacks."""
    from prunekit.errors import ConfigError

    node: Any = cfg
    walked: list[str] = []
    for step in path.split("."):
        if not isinstance(node, dict) or step not in node:
            where = ".".join(walked) or "the config"
            chosen = f" ({node['name']})" if isinstance(node, dict) and "name" in node else ""
            possible = (
                ", ".join(k for k in node if k != "name") if isinstance(node, dict) else "none"
            )
            raise ConfigError(
                f"{where}{chosen} has no key {step!r}; possible: {possible} (a new key: "
                f"+{path}=...)"
            )
        node, walked = node[step], [*walked, step]


def not_found(error: Exception) -> str:
    """Hydra's message on a missing YAML, on one line: what was asked for and what there is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    head = next(line for line in lines if "Could not find" in line)
    options = [
        line
        for line in lines[lines.index(head) + 1 :]
        if not line.startswith(("In ", "Config search", "provider"))
    ]
    return f"{head} {' '.join(options)}"


if __name__ == "__main__":
    sys.exit(main())
