"""Weights in eight bits, of a model that is read and not trained."""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn

from prunekit.errors import ConfigError


def check_int8(option: str) -> None:
    """Raises ConfigError where torchao is missing, or weights are to lie in shards."""
    from prunekit.training.sharding import wants_shards

    if wants_shards():
        raise ConfigError(f"{option}=8: FSDP has shards of weights as they are; possible: null")
    if find_spec("torchao") is None:
        raise ConfigError(
            f"{option}=8 needs torchao, which is not installed: pip install 'prunekit[int8]'; "
            f"or {option}=null"
        )


def to_int8(model: nn.Module) -> nn.Module:
    """Weights of linear modules in int8 with a scale for each output channel, in place; what is
    computed stays in the model's dtype. By torchao.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model
