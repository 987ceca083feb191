"""Importance criteria: one file a method."""
