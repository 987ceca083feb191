"""`prunekit eval CHECKPOINT [OVERRIDE ...]`: a saved checkpoint measured."""

from __future__ import annotations

from prunekit.cli.again import again


def main(argv: list[str]) -> int:
    """Exit status: 0 fine, 1 it failed. Raises ConfigError."""
    return again(argv, recover=False)
