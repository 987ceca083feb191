"""Overrides -> configurations as plain dicts, without running anything: for commands that only
look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def composed(words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every job that `prunekit` with these overrides would run, rows and lists of values included.
    Raises ConfigError.
    """
    from hydra import compose
    from hydra.errors import HydraException
    from omegaconf import open_dict

    from prunekit.cli.overrides import check_keys
    from prunekit.cli.paths import composing
    from prunekit.errors import ConfigError
    from prunekit.runner import sweep

    words = [w for w in words if w not in ("-m", "--multirun")]
    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"{word!r} is no override, such as ratio.target=0.3")
    check_keys(list(words))
    try:
        with composing():
            first = compose(
                "config",
                overrides=[
                    sweep.values(o)[0] for o in sweep.parse(words) if o.get_key_element() != "row"
                ],
            )
            for name, said in sweep.planned(words, first).jobs:
                cfg = compose("config", overrides=said)
                with open_dict(cfg):
                    cfg.out = name
                yield sweep.plain_config(cfg)
    except HydraException as e:
        raise ConfigError(f"cannot compose {' '.join(words)}: {e}") from None
