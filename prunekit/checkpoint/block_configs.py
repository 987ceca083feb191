"""What DeciLM's block configs hold of a model whose layers differ: what `ratio.loadable=deci`
keeps to, and what exports to engines that read them ask for.
"""

from __future__ import annotations

from typing import Any

from prunekit.checkpoint.stock_counts import every_layer
from prunekit.errors import ConfigError
from prunekit.types import Group

LIKE_LLAMA = ("llama", "mistral", "qwen2", "phi3")
"""RMSNorm, SiLU, gated feed-forward, no norm of queries and keys."""
MULTIPLE = 256
"""Of feed-forward widths, by the engines' formula."""
KINDS = ("blocks", "heads", "hidden", "neurons")


def check_groups(model: Any, groups: list[Group]) -> None:
    """Raises ConfigError for a model that is not like Llama, for units that block configs have no
    place for, for feed-forwards of less than the narrowest width, and for heads that only some of
    the layers may lose.
    """
    kind = model.config.model_type
    if kind not in LIKE_LLAMA:
        raise ConfigError(
            f"ratio.loadable=deci is for models like {', '.join(LIKE_LLAMA)}, not {kind}; "
            "possible: stock, any"
        )
    other = sorted({g.kind for g in groups} - set(KINDS))
    if other:
        raise ConfigError(
            f"ratio.loadable=deci: block configs have no place for {other[0]}; possible kinds: "
            f"{', '.join(KINDS)}"
        )
    narrow = next((g for g in groups if g.kind == "neurons" and g.units < MULTIPLE), None)
    if narrow is not None:
        raise ConfigError(
            f"ratio.loadable=deci keeps multiples of {MULTIPLE} neurons, {narrow.name} has "
            f"{narrow.units}; possible: any"
        )
    every_layer(model, [g for g in groups if g.kind == "heads"], "deci")
