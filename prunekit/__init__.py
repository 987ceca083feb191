"""prunekit: pruning of large language models, every method in one place. The names below are the
public interface.
"""

# Imported eagerly on purpose: a submodule that is imported later would hide the function of the
# same name.
from prunekit.checkpoint import load, save
from prunekit.checkpoint.replay import replay
from prunekit.checkpoint.semi_structured import semi_structured
from prunekit.graph import discover, remove, zero
from prunekit.runner.run import run

__all__ = ["discover", "load", "remove", "replay", "run", "save", "semi_structured", "zero"]
__version__ = "0.1.0"
