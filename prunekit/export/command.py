"""`prunekit export CHECKPOINT --to FORM`: a checkpoint in the form that an engine reads."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from prunekit.export.gguf import export_gguf
from prunekit.export.gguf_file import TYPES
from prunekit.export.nemotron_nas import export_nemotron_nas

log = logging.getLogger("prunekit")


def main(argv: list[str]) -> int:
    """Exit status 0; what cannot be written is a ConfigError."""
    parser = argparse.ArgumentParser(
        prog="prunekit export", description="Write a checkpoint in the form that an engine reads."
    )
    parser.add_argument("path", type=Path, help="a checkpoint folder that prunekit wrote")
    parser.add_argument(
        "--to",
        required=True,
        choices=("gguf", "nemotron-nas", "list"),
        help="gguf: for llama.cpp; nemotron-nas: a folder for engines that know DeciLM; list: "
        "which engines take the checkpoint",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="what to write (default: beside the folder, CHECKPOINT.gguf or "
        "CHECKPOINT-nemotron-nas)",
    )
    parser.add_argument(
        "--type",
        default="f16",
        choices=TYPES,
        help="how matrices are stored in GGUF (default: %(default)s)",
    )
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if given.to == "list":
        show(given.path)
        return 0
    path = given.path.resolve()
    if given.to == "nemotron-nas":
        out = given.out or path.parent / f"{path.name}-nemotron-nas"
        log.info("wrote %s", export_nemotron_nas(path, out))
        return 0
    beside = path.parent / f"{path.name}.gguf"
    log.info("wrote %s", export_gguf(path, given.out or beside, type=given.type))
    return 0


def show(path: Path) -> None:
    """The table of engines; no weight is read."""
    from rich.console import Console
    from rich.table import Table

    from prunekit.checkpoint.construction import initialise_buffers
    from prunekit.checkpoint.reader import outline, read_tokenizer
    from prunekit.export.engines import engines, lines

    model = outline(path)
    initialise_buffers(model, "cpu")
    table = Table("engine", "takes it", "how, or what is missing", "what would meet it")
    tokenizer = read_tokenizer(path, [file.name for file in path.iterdir()])
    for line in lines(engines(model, tokenizer)):
        table.add_row(*line)
    Console().print(table, highlight=False)
