"""What models of the Llama kind have in common, for forms that hold sizes of each layer."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from prunekit.checkpoint.class_sizes import nearest_accepted
from prunekit.checkpoint.construction import stock_class
from prunekit.checkpoint.layout import difference
from prunekit.checkpoint.stock_config import mirrored
from prunekit.errors import ConfigError

HALVES = ("self_attn", "mlp")
OF_A_LAYER = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q|k|v|o|qkv)_proj|mlp\.(gate|up|down|gate_up)_proj)"
    r"\.(weight|bias)"
)
NUMBERS = re.compile(r"model\.layers\.\d+\.self_attn\.(num_key_value_groups|num_\w*heads)")


def check_difference(model: Any, config: Any, engine: str) -> None:
    """Raises ConfigError for whatever is not the model's class but for sizes, biases and missing
    halves of layers.
    """
    config = nearest_accepted(stock_class(model), config)
    left = difference(model, config, mirrored(model, config), own_configs=False)
    halves = [
        f"model.layers.{i}.{half}" for i in range(config.num_hidden_layers) for half in HALVES
    ]
    other = [
        f"{module['kind']} at {module['path']}"
        for module in left.get("modules", [])
        if module["kind"] != "bypass" or module["path"] not in halves
    ]
    for part in ("shapes", "absent"):
        other += [name for name in left.get(part, ()) if not OF_A_LAYER.fullmatch(name)]
    other += [name for name in left.get("attributes", ()) if not NUMBERS.fullmatch(name)]
    other += list(left.get("buffers", ()))
    if other:
        raise ConfigError(
            f"{engine} has no place for {other[0]}, which is not what {type(config).__name__} "
            "builds; it takes other widths, biases and missing halves of layers"
        )


def split_fused(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fused matrices (Phi-3) as views of their parts."""
    parted: dict[str, Tensor] = {}
    parts: tuple[str, ...]
    for name, tensor in own.items():
        if "gate_up_proj" in name:
            parts, sizes = ("gate", "up"), [tensor.shape[0] // 2] * 2
        elif "qkv_proj" in name:
            queries = own["self_attn.o_proj.weight"].shape[1]
            rest = (tensor.shape[0] - queries) // 2
            parts, sizes = ("q", "k", "v"), [queries, rest, rest]
        else:
            parted[name] = tensor
            continue
        for part, view in zip(parts, tensor.split(sizes)):
            parted[re.sub("gate_up|qkv", part, name)] = view
    return parted


def empty_attention(width: int, hidden: int) -> dict[str, Tensor]:
    """An attention that adds nothing."""
    into = {f"self_attn.{part}_proj.weight": torch.zeros(width, hidden) for part in "qkv"}
    out = {"self_attn.o_proj.weight": torch.zeros(hidden, width)}
    return into | out | {"input_layernorm.weight": torch.ones(hidden)}


def empty_ffn(width: int, hidden: int) -> dict[str, Tensor]:
    """A feed-forward that adds nothing."""
    into = {f"mlp.{part}_proj.weight": torch.zeros(width, hidden) for part in ("gate", "up")}
    out = {"mlp.down_proj.weight": torch.zeros(hidden, width)}
    return into | out | {"post_attention_layernorm.weight": torch.ones(hidden)}
