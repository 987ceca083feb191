"""What `prunekit recover` and `prunekit eval` share: a checkpoint, overrides, a folder."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from prunekit.cli.compose import composed
from prunekit.cli.overrides import refuse_flags, words_of
from prunekit.errors import ConfigError, expanded


def again(argv: list[str], *, recover: bool) -> int:
    """Composes, runs, shows. Raises ConfigError."""
    words, folder = list(argv), Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    if "--to" in words:
        at = words.index("--to")
        if at + 1 == len(words):
            raise ConfigError("--to needs a folder")
        folder = Path(words.pop(at + 1))
        words.pop(at)
    path = checkpoint_of(words, "recover" if recover else "eval")
    from prunekit.runner.again import configured, run_again  # takes seconds: not before the folder
    from prunekit.runner.job import alone, described, note_failure
    from prunekit.runner.summary import show

    check_words(words)
    configs = list(composed(["model=hf", *words]))
    if len(configs) > 1:
        raise ConfigError("one configuration at a time: lists of values are for a sweep")
    cfg = configured(configs[0] | {"out": str(folder)}, path)
    check_folder(folder, path, cfg)
    try:
        with alone(folder), logged(folder / "run.log"):
            (folder / "failed.txt").unlink(missing_ok=True)
            record = run_again(cfg, folder, recover=recover)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 (as a job does)
        note_failure(folder, error)
        print(f"prunekit: {described(error, folder)}", file=sys.stderr)
        print(
            f"  hint: the same command with --to {folder} goes on with what is kept there",
            file=sys.stderr,
        )
        return 1
    show(record, folder)
    return 0


def checkpoint_of(words: list[str], command: str) -> Path:
    """The folder that the first of `words` names, which is taken off them. Raises ConfigError where
    it is an override: one that is a folder (a sweep's `ratio.target=0.3_seed=0`) is none.
    """
    first = words[0] if words else ""
    path = expanded(first).resolve()
    if not first or ("=" in first and not path.is_dir()):
        given = f", and {first!r} is no folder" if first else ""
        raise ConfigError(f"{command} needs the folder of a checkpoint as its first word{given}")
    words.pop(0)
    return path


def check_folder(folder: Path, path: Path, cfg: dict[str, Any]) -> None:
    """Raises ConfigError where results would replace those of the run that made the checkpoint, the
    checkpoint itself, or what another command left; the same command may be repeated.
    """
    from prunekit.runner.resume import result_key, whole_record

    there = expanded(folder).resolve()
    if there in (path, path.parent) or there / "stages" in path.parents:
        raise ConfigError(f"--to {folder} holds the checkpoint itself; give a folder of its own")
    record = whole_record(there / "result.json") if (there / "result.json").exists() else None
    if record is not None and result_key(record["config"]) != result_key(cfg):
        raise ConfigError(
            f"--to {folder} holds the result of another command, which would be replaced; give "
            "another folder, or remove that one"
        )


def check_words(words: list[str]) -> None:
    """Raises ConfigError for an override of what the checkpoint itself says, or of what only a run
    of Hydra's reads.
    """
    from prunekit.runner import sweep
    from prunekit.runner.again import INHERITED, LOADING

    refuse_flags(words, "overrides such as eval=quick, and --to FOLDER")
    for override in sweep.parse(words_of(words)):
        key = override.key_or_group
        top, _, option = key.partition(".")
        if top in ("hydra", "out"):
            raise ConfigError(f"{override.input_line}: here --to FOLDER says where results go")
        if top in INHERITED or (top == "model" and option not in LOADING):
            loading = ", ".join(f"model.{name}" for name in LOADING)
            raise ConfigError(
                f"{override.input_line}: the checkpoint says that itself; possible: recovery, "
                f"eval, {loading}, and what is no component"
            )


@contextmanager
def logged(file: Path) -> Iterator[None]:
    """Lines of the log on the terminal and in `file`."""
    log = logging.getLogger("prunekit")
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(file)]
    level = log.level
    log.setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s"))
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
