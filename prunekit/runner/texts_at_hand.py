"""Whether the texts of a run can be had: better known before the model is loaded than when the
recovery begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prunekit.data.datasets import Use, check_there
from prunekit.registry import Component


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
        for dataset, split, data_root in _sources(part.options if part else {}):
            check_there(dataset, split, use, data_root)
    for part in evals:
        if "at_hand" in part.meta:
            part.meta["at_hand"](**part.options)


def check_learnt(recovery: Component | None, tokenizer: Any) -> None:
    """Raises ConfigError for a text that the recovery cannot learn from (`register(texts=...)`),
    where the tokenizer is at hand: else it would come up when the pruning is done.
    """
    if recovery is not None and tokenizer is not None and "texts" in recovery.meta:
        recovery.meta["texts"](tokenizer, **recovery.options)


def _sources(options: dict[str, Any]) -> Iterator[tuple[str, str | None, str | None]]:
    """Data set, split and data folder of each text that the options name, those of parts that are
    components themselves included.
    """
    root = options.get("data_root")
    if isinstance(options.get("dataset"), str) and not options.get("path"):
        yield options["dataset"], options.get("split"), root
    for value in options.values():
        for one in value.values() if isinstance(value, dict) else [value]:
            part = getattr(one, "calib", one)
            if isinstance(part, Component):
                yield from _sources(part.options)
            elif part is not None and isinstance(getattr(part, "dataset", None), str):
                yield part.dataset, part.split, root
