"""Whether transformers' own class builds a pruned model, and from which config."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from prunekit.checkpoint.class_sizes import edited, integers, rows, rows_of_config
from prunekit.checkpoint.config_fit import fit
from prunekit.checkpoint.construction import build_on_meta, clean_config, stock_class
from prunekit.checkpoint.layout import difference
from prunekit.checkpoint.state import numbers
from prunekit.errors import ConfigError


def stock_config(model: nn.Module) -> Any | None:
    """The config from which transformers' own class builds this very model, or None where there is
    none.

    Equal are all names and shapes, all numbers that modules keep and that still mean something, and
    all buffers outside the weights.
    """
    kind, config = stock_class(model), clean_config(model.config)
    if edited(config) is not None and builds(model, config):
        return config
    fitted = fit(kind, config, rows(model)).config
    return fitted if edited(fitted) is not None and builds(model, fitted) else None


def builds(model: nn.Module, config: Any) -> bool:
    """Whether transformers' own class builds the model from the config, up to numbers that only
    mirror a field of it.
    """
    try:
        return not difference(model, config, mirrored(model, config), own_configs=False)
    except ConfigError:
        return False


def mirrored(model: nn.Module, config: Any) -> frozenset[str]:
    """Integers of modules that removal left as they were, where the class would have set them from
    a field, as building it with that field shows.

    Such a number plays no part in the forward pass (discovery changes those that do), and the
    class's own value is the true one.
    """
    kind = stock_class(model)
    names: list[str] = []
    answers: dict[tuple[str, str, int, int], bool] = {}
    own = {path: numbers(module) for path, module in build_on_meta(kind, config).named_modules()}
    for path, module in model.named_modules():
        for leaf, mine in numbers(module).items():
            stock = own.get(path, {}).get(leaf)
            if type(mine) is not int or type(stock) is not int or mine == stock:
                continue
            key = (re.sub(r"\.\d+", "", path), leaf, mine, stock)
            if key not in answers:
                answers[key] = _follows_a_field(kind, config, (path, "." + leaf), stock, mine)
            if answers[key]:
                names.append(f"{path}.{leaf}" if path else leaf)
    return frozenset(names)


def _follows_a_field(kind: type, config: Any, row: tuple[str, str], stock: int, mine: int) -> bool:
    """Whether some field of the config that has the value `stock` gives the number `row` the value
    `mine` when it is set to that.
    """
    sizes = integers(config.get_text_config(), parts=True)
    fields = [k for k, v in sizes.items() if v == stock]
    tries = (rows_of_config(kind, edited(config, **{field: mine})) or {} for field in fields)
    return any(found.get(row) == mine for found in tries)
