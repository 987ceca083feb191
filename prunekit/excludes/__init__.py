"""What is left alone."""
