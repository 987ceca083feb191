"""Closed-form updates of what remains: tensors in, tensors out."""
