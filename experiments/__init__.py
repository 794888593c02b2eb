"""Runnable studies of `ef21_jax`: one script per family of figures, see README.md."""
