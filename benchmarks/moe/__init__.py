"""Benchmarks of the mixture-of-experts layer."""
