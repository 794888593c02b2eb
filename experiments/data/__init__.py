"""Data of the experiments."""
