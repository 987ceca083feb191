"""Texts, tasks and training examples, from the hub or from a local folder."""
