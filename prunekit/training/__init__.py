"""Training of a pruned model."""
