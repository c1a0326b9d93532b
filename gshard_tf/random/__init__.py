"""Counter-based random numbers that partition (Threefry)."""

from gshard_tf.random.threefry import microbatch, random_bits, threefry2x32, uniform

__all__ = ["microbatch", "random_bits", "threefry2x32", "uniform"]
