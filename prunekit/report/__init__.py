"""Results on disk as tables and plots; nothing here imports torch."""
