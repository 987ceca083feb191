"""Schedules: when to score, choose and apply."""
