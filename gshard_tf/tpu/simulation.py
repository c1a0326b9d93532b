"""`fit` as on a TPU, on virtual CPU devices: slow, and true to the program.

The step is traced under the strategy, lowered by TensorFlow's TPU bridge, partitioned
by XLA, and run on one CPU device per core, each of which is given what that core holds
and nothing else. It is for tests and measurements; the TPU's own compiler, numbers and
runtime are not in it.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gshard_tf.tpu.bridge import CoreModule, core_module
from gshard_tf.tpu.program import CoreProgram


class SimulatedStep:
    """One function for `strategy.run`, traced for the shapes of a batch.

    Args:
        strategy: A `TPUStrategy`, ours or TensorFlow's.
        fn: What each replica runs.
        batch: A batch as a distributed dataset yields it.
        variables: The variables that `fn` uses, and perhaps others.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        fn: Callable,
        batch: Any,
        variables: Iterable[Any],
    ):
        def step(batch):
            # As Keras does: with several replicas, the logs of the first.
            return tf.nest.map_structure(
                lambda value: strategy.experimental_local_results(value)[0],
                strategy.run(fn, args=(batch,)),
            )

        self.function = tf.function(step, autograph=False).get_concrete_function(batch)
        self.module: CoreModule = core_module(self.function)
        self.program = CoreProgram(self.module)
        self._given = len(self.function.inputs) - len(self.function.captured_inputs)
        by_handle = {
            id(part.handle): part
            for variable in variables
            for part in parts_of(variable)
        }
        # What each core holds, by the input of the function that names it.
        self._variables = {
            self._given + i: by_handle[id(handle)]
            for i, handle in enumerate(self.function.captured_inputs)
            if handle.dtype == tf.resource
        }

    def __call__(self, batch: Any) -> Any:
        """Runs it, and gives every core its part of the new state."""
        flat = [part.numpy() for part in tf.nest.flatten(batch, expand_composites=True)]

        def held(i: int) -> np.ndarray:
            if i < self._given:
                return flat[i]
            if i in self._variables:
                return self._variables[i].numpy()
            return self.function.captured_inputs[i - self._given].numpy()

        outputs, updates = self.program(held)
        for (argument, _), values in zip(self.module.updates, updates, strict=True):
            inputs = [i for row in self.module.arguments[argument].inputs for i in row]
            for i, value in zip(inputs, values, strict=True):
                self._variables[i].assign(value)
        structure = self.function.structured_outputs
        return tf.nest.pack_sequence_as(structure, outputs)


def parts_of(variable: Any) -> Iterator[Any]:
    """The variables of the cores behind a variable of a `TPUStrategy`."""
    for replica in getattr(variable, "values", [variable]):
        yield from getattr(replica, "_vars", [replica])


def simulate_fit(model: keras.Model) -> list[SimulatedStep]:
    """Lets `model.fit` run its steps here from now on; all else of it is as ever.

    Args:
        model: Made and compiled in the scope of a `TPUStrategy`.

    Returns:
        The steps, one per shape, filled as they are traced.
    """
    steps: list[SimulatedStep] = []
    known: dict[Any, SimulatedStep] = {}

    def train_function(iterator):
        batch = next(iterator)
        parts = tf.nest.flatten(batch, expand_composites=True)
        key = tuple(tuple(part.shape) for part in parts)
        if key not in known:
            variables = [
                *model.variables,
                *model.metrics_variables,
                *model.optimizer.variables,
            ]
            known[key] = SimulatedStep(
                model.distribute_strategy,
                model.train_step,
                batch,
                [variable.value for variable in variables],
            )
            steps.append(known[key])
        return known[key](batch)

    def make_train_function(force=False):
        del force
        model.train_function = train_function
        return train_function

    model.make_train_function = make_train_function
    return steps
