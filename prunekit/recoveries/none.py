"""No recovery."""

from __future__ import annotations

from typing import Any

from torch import nn

from prunekit.registry import recoveries
from prunekit.types import Pruned


@recoveries.register()
def none(pruned: Pruned, tokenizer: Any) -> nn.Module:
    """The pruned model as it is."""
    return pruned.model
