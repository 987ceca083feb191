"""Whether the texts of a run can be had, and whether one is both learnt from and tested on: better
known before the model is loaded than when the recovery begins.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from prunekit.data.datasets import Dataset, Use, check_there, default_split
from prunekit.registry import Component
from prunekit.runner.preflight import Components

log = logging.getLogger("prunekit")


class Text(NamedTuple):
    """A data set, in a split or in the one that its use takes, or a file."""

    dataset: str | None
    split: str | None
    path: str | None
    data_root: str | None

    def name(self, use: Use) -> str:
        """`alpaca (train)`, or the file's absolute path."""
        if self.path or self.dataset is None:
            return str(Path(str(self.path)).expanduser().resolve())
        return f"{self.dataset} ({self.split or default_split(self.dataset, use)})"


def check_texts(
    *evals: Component,
    calibrated: Component | None = None,
    learnt: Iterable[Component | None] = (),
) -> None:
    """Raises ConfigError for a data set of a part that is neither in the data folder nor on the
    hub, tasks of evals (`register(at_hand=...)`) included. What a part is for says which split it
    takes where none is named.
    """
    uses: list[tuple[Use, Component | None]] = [("evaluate", part) for part in evals]
    uses += [("calibrate", calibrated), *[("recover", part) for part in learnt]]
    for use, part in uses:
        for text in _texts(part.options if part else {}):
            if text.dataset and not text.path:
                check_there(text.dataset, text.split, use, text.data_root)
    for part in evals:
        if "at_hand" in part.meta:
            part.meta["at_hand"](**part.options)


def check_tokenized(tokenizer: Any, parts: Components) -> None:
    """Raises ConfigError for what a part cannot do with the tokenizer (`register(tokenized=...)`):
    learn from too little text, or ask in a chat template that is not there. It would come up in
    the midst of the run. None is a tokenizer that comes with the weights: later, then.
    """
    if tokenizer is None:
        return
    for part in (parts.pruner, parts.recovery, *parts.evals.values()):
        if part is not None and "tokenized" in part.meta:
            part.meta["tokenized"](tokenizer, **part.options)


def warn_of_learnt(evals: Mapping[str, Component], learnt: Iterable[Component | None]) -> None:
    """Warns of an eval that reads the very text that the pruner or the recovery learns from."""
    for part in learnt:
        mine = {text.name("recover") for text in _texts(part.options if part else {})}
        for name, evaluate in evals.items():
            for text in sorted(mine & {t.name("evaluate") for t in _texts(evaluate.options)}):
                log.warning(
                    "%s learns from %s, which eval %s reads: its numbers are no test",
                    part.name if part else None,
                    text,
                    name,
                )


def _texts(options: dict[str, Any]) -> Iterator[Text]:
    """Each text that the options name, those of parts that are components themselves included.
    What is in no data set (`dataset=generated`) is none.
    """
    known = get_args(Dataset)
    root, path, dataset = (options.get(k) for k in ("data_root", "path", "dataset"))
    if path or dataset in known:
        yield Text(dataset if dataset in known else None, options.get("split"), path, root)
    for value in options.values():
        for one in value.values() if isinstance(value, dict) else [value]:
            part: Any = getattr(one, "calib", one)
            if isinstance(part, Component):
                yield from _texts(part.options)
            elif getattr(part, "path", None) or getattr(part, "dataset", None) in known:
                yield Text(part.dataset, part.split, part.path, root)
