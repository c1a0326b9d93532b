"""Counter-based random numbers that partition (Threefry)."""

from gshard_tf.random.threefry import random_bits, threefry2x32, uniform

__all__ = ["random_bits", "threefry2x32", "uniform"]
