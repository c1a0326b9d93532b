"""Adafactor as in its paper: without a second moment of the weight's size."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from gshard_tf import logical_axes, name_axes
from gshard_tf.compat import keras_optimizers
from gshard_tf.compat.keras_optimizers import Slot


@keras.saving.register_keras_serializable(package="gshard_tf")
class Adafactor(keras.optimizers.Adafactor):
    """Keras's Adafactor, step for step, in about half of its memory.

    In addition to the row and column factors of a matrix, Keras 3.15 keeps their
    product, as large as the weight itself (`velocity`), although every step computes it
    anew. This optimizer keeps the factors alone (Adafactor, arXiv 1804.04235, algorithm
    4), which is what the paper trained with. For a weight of more than two dimensions,
    `[E, M, H]` say, the last two are factored, for each expert by itself.

    The gradient of a table is summed over the look-ups of each row before it is
    squared; Keras's own squares each look-up by itself.

    Arguments are those of `keras.optimizers.Adafactor`.
    """

    def build(self, variables: list[keras.Variable]) -> None:
        if not self.built:
            keras_optimizers.build_adafactor(self, variables, self._create_slots)

    def _create_slots(self, variable: keras.Variable) -> tuple[Slot, Slot, Slot]:
        rank = len(variable.shape)
        if rank < 2:
            whole = self.add_variable_from_reference(variable, name="velocity")
            return None, None, whole
        rows = self._create_factor(variable, "rows", range(rank - 1))
        columns = self._create_factor(variable, "columns", [*range(rank - 2), rank - 1])
        return rows, columns, None

    def _create_factor(
        self, variable: keras.Variable, name: str, dims: Sequence[int]
    ) -> keras.Variable:
        """A slot of some dimensions of a weight, split as they are."""
        factor = self.add_variable(
            shape=[variable.shape[d] for d in dims],
            dtype=variable.dtype,
            name=f"{variable.path.replace('/', '_')}_{name}",
        )
        axes = logical_axes(variable)
        return factor if axes is None else name_axes(factor, [axes[d] for d in dims])

    def update_step(
        self, gradient: Any, variable: keras.Variable, learning_rate: Any
    ) -> None:
        """One step for one weight; formulas and names as in Keras."""
        if len(variable.shape) < 2:
            super().update_step(gradient, variable, learning_rate)
            return
        if isinstance(gradient, tf.IndexedSlices):
            # The sum, for each row of a table, over its look-ups.
            gradient = tf.convert_to_tensor(gradient)
        rows, columns = keras_optimizers.adafactor_factors(self, variable)
        dtype = variable.dtype
        rate = ops.cast(learning_rate, dtype)
        gradient = ops.cast(gradient, dtype)
        step = ops.cast(self.iterations + 1, dtype)
        if self.relative_step and not keras_optimizers.has_scheduled_rate(self):
            rate = ops.minimum(rate, 1 / ops.sqrt(step))
        rho = ops.minimum(rate, 1 / ops.sqrt(step))
        scale = ops.maximum(ops.cast(self.epsilon_2, dtype), _rms(variable)) * rho
        decay = 1 - ops.power(step, self.beta_2_decay)
        square = ops.square(gradient) + self.epsilon_1
        self.assign(rows, decay * rows + (1 - decay) * ops.mean(square, axis=-1))
        self.assign(columns, decay * columns + (1 - decay) * ops.mean(square, axis=-2))
        # The paper's V, never as a variable.
        relative = rows / ops.mean(rows, axis=-1, keepdims=True)
        second = ops.expand_dims(relative, -1) * ops.expand_dims(columns, -2)
        update = gradient / ops.sqrt(second)
        clip = ops.maximum(ops.cast(1.0, dtype), _rms(update) / self.clip_threshold)
        self.assign_sub(variable, scale * update / clip)


def _rms(x: Any) -> Any:
    """The root of the mean square of all elements."""
    return ops.sqrt(ops.mean(ops.square(x)))
