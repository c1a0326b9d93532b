"""Keras callbacks: checkpoints, the guard against NaN, verification."""
