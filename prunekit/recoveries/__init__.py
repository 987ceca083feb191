"""Recoveries: functions that train a pruned model so that it gets back what pruning took."""
