"""The file that travels inside a checkpoint; it must import nothing of prunekit."""
