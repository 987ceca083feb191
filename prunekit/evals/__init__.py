"""Evaluations: functions that measure a model and return numbers whose keys carry the unit."""

from __future__ import annotations

from prunekit.architecture.modes import eval_mode

__all__ = ["eval_mode"]
