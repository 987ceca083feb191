"""What a model is made of: its blocks, linear modules, matrices, residual stream, sizes."""
