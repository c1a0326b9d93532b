"""Optimizers whose state is small enough for large models."""

from gshard_tf.optimizers.adafactor import Adafactor

__all__ = ["Adafactor"]
