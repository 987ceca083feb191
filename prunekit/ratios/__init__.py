"""How much to remove, and of what."""
