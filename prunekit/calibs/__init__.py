"""Calibration data: functions that draw token windows from text."""
