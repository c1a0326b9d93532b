"""Benchmarks that run on a GPU with jax alone."""
