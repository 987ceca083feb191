"""Models: functions that load or build a causal language model and its tokenizer."""
