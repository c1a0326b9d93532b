"""Benchmarks of decoding."""
