"""Hydra plugins of prunekit: they must live in the namespace `hydra_plugins`, which is the only
place Hydra takes plugins from.
"""
