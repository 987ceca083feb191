"""Texts to be tested on, by name, and which of them count as unseen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, ConfigDict
from torch import Tensor

from prunekit.data.datasets import Dataset, evaluation_text
from prunekit.data.files import TextFile
from prunekit.errors import ConfigError
from prunekit.evals.texts_read import texts_read
from prunekit.evals.windows import cut, token_ids
from prunekit.registry import Component


@dataclass(frozen=True)
class EvaluationText:
    """A data set, in the split that is kept for evaluation unless another is named, or a file."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    dataset: Dataset | None = None
    split: str | None = None
    path: TextFile | None = None

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.path is None):
            raise ValueError("a text is either a dataset or a path")


def _several(texts: dict[str, EvaluationText]) -> dict[str, EvaluationText]:
    if not texts:
        raise ValueError("name a text at least: {ptb: {dataset: ptb}}")
    return texts


Texts = Annotated[dict[str, EvaluationText], AfterValidator(_several)]


def spread(windows: Tensor, limit: int) -> Tensor:
    """At most `limit` of the windows `(N, T)`, at even distances over the text."""
    if len(windows) <= limit:
        return windows
    return windows[torch.arange(limit) * len(windows) // limit]


def windows_of(
    source: EvaluationText,
    tokenizer: Any,
    *,
    window: int,
    limit: int,
    bos: bool,
    data_root: str | None,
) -> Tensor:
    """At most `limit` windows `(N, window)` at even distances over a text. Raises ConfigError where
    the text is not there or shorter than a window.
    """
    text = evaluation_text(source.dataset, source.split, source.path, data_root)
    return spread(cut(token_ids(text, tokenizer, bos), window), limit)


def check_seen(
    what: str, calib: Component, texts: dict[str, EvaluationText], seen: list[str]
) -> None:
    """Raises ConfigError for a name in `seen` that is no text, and where a text that counts as
    unseen is of a data set or file that `calib` reads. `what` is the eval's name.
    """
    unknown = [name for name in seen if name not in texts]
    if unknown:
        raise ConfigError(
            f"eval={what}: seen={', '.join(unknown)} is no text; there are: {', '.join(texts)}"
        )
    calibrated = texts_read(calib)
    for name, source in texts.items():
        if name not in seen and texts_read(source) & calibrated:
            raise ConfigError(
                f"eval={what}: {name} counts as unseen, but calib={calib.name} reads "
                f"{source.dataset or source.path} too; name it in seen, or calibrate on another "
                "text"
            )
