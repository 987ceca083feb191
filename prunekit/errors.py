"""Errors that a user can mend."""

from __future__ import annotations


class ConfigError(ValueError):
    """Something the user asked for cannot be.

    The message says what was given and what is possible.
    """


class NotFinite(ArithmeticError):
    """NaN or infinity where there must be a number. The message names the stage and the layer."""


class NeedsData(ConfigError):
    """An answer that hangs on weights or text was asked for where only shapes are known."""
