"""`fit` as on a TPU, on virtual CPU devices: slow, and with the program of a TPU.

The step is traced under the strategy, lowered by TensorFlow's TPU bridge, partitioned
by XLA, and run on one CPU device per core, each of which gets the shards of that core
and nothing else. It is for tests and measurements; the TPU's own compiler, numbers and
runtime are not simulated.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gshard_tf.testing.tpu.bridge import CoreModule, core_module
from gshard_tf.testing.tpu.core_program import CoreProgram


class SimulatedStep:
    """One function for `strategy.run`, traced for the shapes of a batch.

    Args:
        strategy: A `TPUStrategy`, of `gshard_tf.tpu_strategy` or TensorFlow's own.
        fn: The function that each replica runs.
        batch: A batch as a distributed dataset yields it, or its `tf.TypeSpec`s.
        variables: The variables that `fn` uses; there may be others among them.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        fn: Callable,
        batch: Any,
        variables: Iterable[Any],
    ):
        def step(batch):
            # As Keras does: with several replicas, the logs of the first. The method of
            # the class, which `simulate_fit` leaves as it is.
            return tf.nest.map_structure(
                lambda value: strategy.experimental_local_results(value)[0],
                type(strategy).run(strategy, fn, args=(batch,)),
            )

        self.function = tf.function(step, autograph=False).get_concrete_function(batch)
        self.module: CoreModule = core_module(self.function)
        self.program = CoreProgram(self.module)
        captured = self.function.captured_inputs
        self._num_arguments = len(self.function.inputs) - len(captured)
        by_handle = {
            id(each.handle): each
            for variable in variables
            for each in core_variables(variable)
        }
        # The variable of each core, by the number of its handle's input.
        self._variables = {
            self._num_arguments + i: by_handle[id(handle)]
            for i, handle in enumerate(captured)
            if handle.dtype == tf.resource
        }

    def __call__(self, batch: Any) -> Any:
        """Runs it, and assigns every core its shard of the new state."""
        flat = [each.numpy() for each in tf.nest.flatten(batch, expand_composites=True)]

        def value_of(i: int) -> np.ndarray:
            if i < self._num_arguments:
                return flat[i]
            if i in self._variables:
                return self._variables[i].numpy()
            return self.function.captured_inputs[i - self._num_arguments].numpy()

        outputs, updates = self.program(value_of)
        for (argument, _), values in zip(self.module.updates, updates, strict=True):
            inputs = [i for row in self.module.arguments[argument].inputs for i in row]
            for i, value in zip(inputs, values, strict=True):
                self._variables[i].assign(value)
        structure = self.function.structured_outputs
        return tf.nest.pack_sequence_as(structure, outputs)


def core_variables(variable: Any) -> Iterator[Any]:
    """Yields the variables of the cores behind a variable of a `TPUStrategy`."""
    for replica in getattr(variable, "values", [variable]):
        yield from getattr(replica, "_vars", [replica])


def simulate_fit(model: keras.Model) -> list[SimulatedStep]:
    """Makes `model.fit` run its steps here from now on; the rest of it stays.

    Keras's own training function is traced, with its loop where `steps_per_execution`
    is more than 1. Only `strategy.run`, which it calls, is replaced: other models can
    no longer use the strategy.

    Args:
        model: Created and compiled in the scope of a `TPUStrategy`.

    Returns:
        The steps, one per shape, filled as they are traced.
    """
    strategy = model.distribute_strategy
    steps: list[SimulatedStep] = []
    known: dict[Any, SimulatedStep] = {}

    def run(fn: Callable, args: tuple[Any]) -> Any:
        [batch] = args
        inputs = tf.nest.flatten(batch, expand_composites=True)
        key = (fn, *(tuple(each.shape) for each in inputs))
        if key not in known:
            variables = [
                *model.variables,
                *model.metrics_variables,
                *model.optimizer.variables,
            ]
            specs = tf.nest.map_structure(tf.type_spec_from_value, batch)
            values = [variable.value for variable in variables]
            # Out of the function that is being traced here. `tf.init_scope` would leave
            # it too, but record no gradients.
            with ThreadPoolExecutor(1) as thread:
                future = thread.submit(SimulatedStep, strategy, fn, specs, values)
                known[key] = future.result()
            steps.append(known[key])
        step = known[key]
        logs = tf.nest.flatten(step.function.structured_outputs)
        values = tf.py_function(
            lambda *values: tf.nest.flatten(step(values)),
            inputs,
            [log.dtype for log in logs],
        )
        for value, log in zip(values, logs, strict=True):
            value.set_shape(log.shape)
        return tf.nest.pack_sequence_as(step.function.structured_outputs, values)

    strategy.run = run
    return steps
