"""Keras's global seed generator, which unseeded `keras.random` draws from."""

import contextlib
from collections.abc import Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

# Private API: Keras keeps the generator of all unseeded `keras.random` functions in the
# state of the thread, and makes it when it is first drawn from. On an upgrade, check
# that `global_seed_generator` still looks for it under this name and that
# `keras.utils.set_random_seed` still drops it.
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import (
    GLOBAL_SEED_GENERATOR,
    global_seed_generator,
)


def global_seed_state() -> tf.Variable | None:
    """The state of Keras's global seed generator, or None if there is none yet."""
    generator = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    return None if generator is None else generator.state.value


@contextlib.contextmanager
def own_global_seed_generator() -> Iterator[None]:
    """Context in which Keras has only a global seed generator that is created there."""
    before = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, None)
    try:
        yield
    finally:
        global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, before)


def give_global_seed_generator(state: Sequence[int]) -> None:
    """Gives Keras's global seed generator a state; makes it if there is none yet."""
    global_seed_generator().state.assign(np.array(state))


class SeedGeneratorOfState(keras.random.SeedGenerator):
    """A `SeedGenerator` around a state that exists, of any shape.

    For a layer to own the state as a seed, not as a weight; `next` is for a subclass.

    Relies on: Keras tracks a generator by its class and reads `name`, `state` and
    `_initial_seed`. On an upgrade, watch: the base class's constructor sets no other
    attribute that a layer reads.
    """

    def __init__(self, state: keras.Variable, name: str):
        # Not that of the base class, which makes a state of its own.
        self.name = name
        self._initial_seed = None
        self.state = state
