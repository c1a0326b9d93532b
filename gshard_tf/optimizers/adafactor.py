"""Adafactor as its authors meant it: without a second moment of the weight's size."""

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from gshard_tf import logical_axes, name_axes


@keras.saving.register_keras_serializable(package="gshard_tf")
class Adafactor(keras.optimizers.Adafactor):
    """Keras's Adafactor, step for step, in about half of its memory.

    Keras 3.15 keeps, beside the row and column factors of a matrix, their product, as
    large as the weight itself (`velocity`), although every step makes it anew. This
    one keeps the factors alone (Adafactor, arXiv 1804.04235, algorithm 4), which is
    what the paper trained with. For a weight of more than two dimensions, `[E, M, H]`
    say, the last two are factored, for each expert by itself.

    The gradient of a table is summed over the look-ups of each row before it is
    squared; Keras's own squares each look-up by itself.

    Arguments are those of `keras.optimizers.Adafactor`.
    """

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        # Past Keras's own `build`, which would make the large slots.
        super(keras.optimizers.Adafactor, self).build(variables)
        self._r, self._c, self._v = [], [], []
        for variable in variables:
            shape = tuple(variable.shape)
            rows = columns = whole = None
            if len(shape) < 2:
                whole = self.add_variable_from_reference(variable, name="velocity")
            else:
                rows = self._factor(variable, "rows", range(len(shape) - 1))
                columns = self._factor(
                    variable, "columns", [*range(len(shape) - 2), len(shape) - 1]
                )
            self._r.append(rows)
            self._c.append(columns)
            self._v.append(whole)

    def _factor(self, variable: Any, name: str, dims: Any) -> keras.Variable:
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
            # Of a table: the sum of what its rows were looked up for.
            gradient = tf.convert_to_tensor(gradient)
        index = self._get_variable_index(variable)
        rows, columns = self._r[index], self._c[index]
        dtype = variable.dtype
        rate = ops.cast(learning_rate, dtype)
        gradient = ops.cast(gradient, dtype)
        step = ops.cast(self.iterations + 1, dtype)
        if not callable(self._learning_rate) and self.relative_step:
            rate = ops.minimum(rate, 1 / ops.sqrt(step))
        rho = ops.minimum(rate, 1 / ops.sqrt(step))
        scale = ops.maximum(ops.cast(self.epsilon_2, dtype), self._rms(variable)) * rho
        decay = 1 - ops.power(step, self.beta_2_decay)
        square = ops.square(gradient) + self.epsilon_1
        self.assign(rows, decay * rows + (1 - decay) * ops.mean(square, axis=-1))
        self.assign(columns, decay * columns + (1 - decay) * ops.mean(square, axis=-2))
        # What the paper calls V, never as a variable.
        relative = rows / ops.mean(rows, axis=-1, keepdims=True)
        second = ops.expand_dims(relative, -1) * ops.expand_dims(columns, -2)
        update = gradient / ops.sqrt(second)
        clip = ops.maximum(
            ops.cast(1.0, dtype), self._rms(update) / self.clip_threshold
        )
        self.assign_sub(variable, scale * update / clip)
