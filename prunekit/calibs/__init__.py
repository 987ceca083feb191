"""Calibration data: functions that draw token windows from text, or from the model itself."""
