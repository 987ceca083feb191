"""The one error that a user can mend."""

from __future__ import annotations


class ConfigError(ValueError):
    """Something the user asked for cannot be; the message says what was given and
    what is possible.
    """
