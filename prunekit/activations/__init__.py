"""Running calibration text: the whole model or block by block, and statistics of what flows."""
