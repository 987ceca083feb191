"""Calibration data: functions that draw token windows from text, or from the model itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from prunekit.registry import Component


def draw(calib: Component, tokenizer: Any, model: nn.Module) -> Any:
    """The tokens of a calib, which is handed the dense model too if it is registered with
    `needs="model"`. `(N, T)` int64, or several by name. Raises ConfigError.
    """
    if calib.meta.get("needs") == "model":
        return calib(tokenizer, model)
    return calib(tokenizer)
