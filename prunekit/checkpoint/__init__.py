"""Pruned models as folders that load by themselves: save, load, replay, export."""

from prunekit.checkpoint.io import load, outline, save

__all__ = ["load", "outline", "save"]
