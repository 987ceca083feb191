"""From gradients and activations to a score for each unit."""
