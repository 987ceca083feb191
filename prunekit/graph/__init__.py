"""Discovery of what is coupled in a model, by tracing it; zeroing and removing units; the proof
that both are the same.
"""

from prunekit.graph.discovery import discover, report, verify
from prunekit.graph.edit_record import edits
from prunekit.graph.gated import gated
from prunekit.graph.surgery import rebuild, remove, zero
from prunekit.graph.zero_masks import zero_masks

__all__ = [
    "discover",
    "edits",
    "gated",
    "rebuild",
    "remove",
    "report",
    "verify",
    "zero",
    "zero_masks",
]
