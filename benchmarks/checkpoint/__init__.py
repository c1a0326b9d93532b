"""Benchmarks of checkpoints: cost, kills, faults, soak."""
