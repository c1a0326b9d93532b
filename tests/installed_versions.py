"""Versions that tests are run with, to compare with pairs of numbers."""

import jax
import keras

KERAS = tuple(int(n) for n in keras.__version__.split(".")[:2])
JAX = tuple(int(n) for n in jax.__version__.split(".")[:2])
