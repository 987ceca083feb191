"""Pruned models as folders that load by themselves: save, load, replay, export."""

from prunekit.checkpoint.reader import load, outline
from prunekit.checkpoint.writer import save

__all__ = ["load", "outline", "save"]
