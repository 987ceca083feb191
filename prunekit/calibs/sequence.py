"""Several texts, one after the other: for methods that meet one text at a time."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator
from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.registry import Component, built, calibs, draw


def _components(nodes: Any) -> dict[str, Component]:
    if not isinstance(nodes, dict) or len(nodes) < 2:
        raise ValueError("a sequence names two texts or more: {name: {name: crop, ...}, ...}")
    if "calibration" in nodes:
        raise ValueError("all texts together are called calibration: call this one otherwise")
    return {str(name): built("calib", node) for name, node in nodes.items()}


Texts = Annotated[Any, BeforeValidator(_components)]


@calibs.register(several=True, needs="model")
def sequence(tokenizer: Any, model: nn.Module, *, texts: Texts) -> dict[str, Tensor]:
    """The texts of other calibs by name, in order, for pruner=copal; other methods calibrate on all
    of them together.

    texts: name -> a calib, e.g. {ptb: {name: crop, dataset: ptb, samples: 32, length: 512}}.

    Raises ConfigError where samples are not of one length.
    """
    found = {name: draw(calib, tokenizer, model) for name, calib in texts.items()}
    lengths = {name: tokens.shape[1] for name, tokens in found.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"calib=sequence: samples must have one length, there are {lengths}")
    return found
