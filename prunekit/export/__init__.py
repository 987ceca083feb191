"""Checkpoints in the forms that serving engines read."""
