"""The console script: Hydra overrides run an experiment; a first word without `=`
names a command.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from difflib import get_close_matches
from typing import Any

import prunekit
from prunekit.cli.paths import conf_dir
from prunekit.cli.suggestions import homes
from prunekit.errors import ConfigError, cannot_write

COMMANDS = {
    "eval": (
        "prunekit.cli.evaluate",
        "eval CHECKPOINT [OVERRIDE ...] [--to FOLDER]: a saved checkpoint measured again",
    ),
    "export": (
        "prunekit.export.command",
        "export CHECKPOINT --to gguf|nemotron-nas|list [--out PATH] "
        "[--type f32|f16|bf16|q8_0|q4_k]: a file for llama.cpp; a folder for engines that know "
        "DeciLM; which engines take the checkpoint",
    ),
    "groups": (
        "prunekit.inventory.command",
        "groups [OVERRIDE ...] [--json] [--all] [--block N] [--to FILE]: what goes together in a "
        "model, as tree, JSON or picture",
    ),
    "list": (
        "prunekit.cli.list",
        "list [KIND [NAME]]: every registered component, its options, one line each; one of them: "
        "what its options mean; `list experiment`: whole runs",
    ),
    "plan": (
        "prunekit.cli.plan",
        "plan [OVERRIDE ...]: sizes, MACs and memory that a run would leave; no weights are read",
    ),
    "recover": (
        "prunekit.cli.recover",
        "recover CHECKPOINT [OVERRIDE ...] [--to FOLDER]: a saved checkpoint recovered, measured "
        "and saved",
    ),
    "report": (
        "prunekit.report.command",
        "report DIR... [--to FILE]: the results below DIR as tables and plots, the paper's "
        "numbers beside them",
    ),
}
"""command -> (module with `main(argv) -> int`, help line)."""
WITH_FLAGS = ("export", "groups", "report")
"""Commands whose own parser says more of them."""
HELP = ("-h", "--help")
FLAGS = (
    "help hydra-help version cfg resolve package run multirun shell-completion config-path "
    "config-name config-dir experimental-rerun info"
).split()
"""Hydra's own, by their long names."""

USAGE = """prunekit [OVERRIDE ...]            one experiment: e.g. criterion=l2 ratio.target=0.3 recovery=lora
prunekit -m [OVERRIDE ...]         a sweep: e.g. ratio.target=0.1,0.2,0.3 criterion=taylor,random
prunekit experiment=llm_pruner/table6   all rows of a paper's table; scale=small: in little; a,b: one table after the other
prunekit --cfg job [OVERRIDE ...]  the composed configuration, nothing run
"""  # noqa: E501  (a table)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 fine, 1 a job failed, 2 what was asked for cannot be."""
    args = sys.argv[1:] if argv is None else argv
    if args and args[0] in (*HELP, "help"):
        print(USAGE + "\n".join(f"prunekit {line}" for _, line in COMMANDS.values()))
        return 0
    if args == ["--version"]:
        print(f"prunekit {prunekit.__version__}")
        return 0
    try:
        if args and args[0] in COMMANDS:
            if args[0] not in WITH_FLAGS and any(word in HELP for word in args[1:]):
                print(f"prunekit {COMMANDS[args[0]][1]}")
                return 0
            hush_libraries()
            status: int = importlib.import_module(COMMANDS[args[0]][0]).main(args[1:])
            sys.stdout.flush()
            return status
        check_words(args)
        return max([launch(words) for words in one_experiment_each(flags_first(args))])
    except ConfigError as e:
        print(f"prunekit: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as with `| head`; nothing more may be written, at the exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        if (words := cannot_write(e)) is None:
            raise
        print(f"prunekit: {words}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prunekit: interrupted", file=sys.stderr)
        return 130


def check_words(args: list[str]) -> None:
    """Raises ConfigError for words that are no override, no flag and no flag's value, and for flags
    that exclude each other.
    """
    shown = {"-c", "--cfg", "-i", "--info"} & {word.partition("=")[0] for word in args}
    if shown and {"-m", "--multirun"} & set(args):
        raise ConfigError(
            f"{shown.pop()} shows one configuration and runs nothing, -m runs several: give one of "
            "the two"
        )
    for before, word in zip(["", *args], args):
        if word.startswith("--") and word[2:].partition("=")[0] not in FLAGS:
            raise ConfigError(
                f"no flag {word!r}; what is asked for is typed as overrides, such as "
                "ratio.target=0.3 (`prunekit --help`)"
            )
        if word.startswith("out="):  # Hydra's folder, which code may name so
            raise ConfigError(
                f"{word}: give hydra.run.dir=FOLDER, or of a sweep hydra.sweep.dir=FOLDER"
            )
        # A flag of Hydra may be followed by its value: --cfg job.
        valued = before.startswith("-") and before not in ("-m", "--multirun")
        if "=" in word[1:] or word.startswith(("-", "~")) or valued:
            continue
        if word == "=" or word.startswith("=") or args[args.index(word) + 1 :][:1] == ["="]:
            raise ConfigError(f"{' '.join(args)!r}: an override is one word: key=value")
        meant = get_close_matches(word, COMMANDS) or homes(word)
        hint = f"\n  hint: did you mean {' or '.join(meant[:3])}?" if meant else ""
        raise ConfigError(
            f"no command {word!r}; there are: {', '.join(COMMANDS)}, or overrides such as "
            f"ratio.target=0.3{hint}"
        )


def flags_first(args: list[str]) -> list[str]:
    """Flags with their values, then the overrides: argparse takes no flag between overrides."""
    sides: tuple[list[str], list[str]] = ([], [])
    for before, word in zip(["", *args], args):
        valued = before.startswith("-") and before not in ("-m", "--multirun") and "=" not in word
        sides[not (word.startswith("-") or valued)].append(word)
    return [*sides[0], *sides[1]]


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
    from prunekit.cli.overrides import check_composition, check_keys, two_lines

    check_keys(args)
    check_composition(args)
    hush_libraries()

    import hydra
    from hydra.core.plugins import Plugins
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from hydra_plugins.prunekit_sweeper.searchpath import OwnFolder
    from hydra_plugins.prunekit_sweeper.sweeper import TableSweeper

    failures: list[str] = []

    def job(cfg: Any) -> float | None:
        from prunekit.runner.job import run_job
        from prunekit.runner.sweep import plain_config

        hush_libraries()  # this may be a worker
        hush_bars()
        logging.raiseExceptions = False  # a log on a full disk is no reason for tracebacks
        return run_job(plain_config(cfg), failures)

    # The sweeper adds the jobs that ended badly. Hydra finds plugins by itself but for editable
    # installs, whose namespace it cannot list.
    job.failures = failures  # type: ignore[attr-defined]
    for plugin in (OwnFolder, TableSweeper):
        Plugins.instance().register(plugin)

    before, sys.argv = sys.argv, [sys.argv[0], *args]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # what goes wrong in Hydra is said here, not by it
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(two_lines(e)) from None
    except OSError as e:
        raise ConfigError(f"{e.filename or 'a file'} cannot be written: {e.strerror}") from None
    finally:
        sys.argv = before
    for line in failures:
        print(line, file=sys.stderr)
    return 2 if any("ConfigError" in f for f in failures) else bool(failures)


def hush_libraries() -> None:
    """What libraries say of themselves while they load is of no use here: optional kernels that
    torchao could not find, torch's note on enums.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def hush_bars() -> None:
    """Transformers' bars over tensors name no unit and last a moment; those over downloads stay."""
    from huggingface_hub import utils as hub
    from transformers.utils.logging import disable_progress_bar

    downloads = not hub.are_progress_bars_disabled()  # type: ignore[attr-defined]
    disable_progress_bar()
    if downloads:
        hub.enable_progress_bars()  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
