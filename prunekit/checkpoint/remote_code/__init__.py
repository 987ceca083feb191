"""The files that travel inside a checkpoint; they import nothing but each other, torch and
transformers.
"""
