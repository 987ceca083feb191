"""Evaluations: functions that measure a model and return numbers whose keys carry the unit."""
