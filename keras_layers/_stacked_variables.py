"""Variables of repeated blocks: one stacked variable for all repetitions."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from gshard_tf.compat.keras_seeds import SeedGeneratorOfState
from keras_layers.remat import stored_values
from keras_layers.step_metrics import StepMetric

Blocks = Sequence[keras.layers.Layer]


class Untracked:
    """Wrapper that hides its value from Keras's and TensorFlow's tracking."""

    def __init__(self, value: Any):
        self.value = value


class _StandIn:
    """Placeholder of a block's own `tf.Variable`, with its initial value only."""

    def __init__(self, initial_value: Callable[[], tf.Tensor]):
        self.initial_value = initial_value

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Any:
        raise ValueError(
            "A slice of a stacked variable cannot be read by itself: read the "
            f"variables of the `Stacked` layer. Received: dtype={dtype}, name={name}"
        )


def stand_in(next_creator: Callable, **kwargs: Any) -> _StandIn:
    """Variable creator that makes placeholders in place of variables."""
    del next_creator  # it would make a variable
    return _StandIn(kwargs["initial_value"])


def stacked_initializer(each: Sequence[keras.Variable]) -> Callable:
    """Returns an initializer of the stacked initial values of some placeholders."""
    stand_ins = [v.value for v in each]

    def initializer(shape: Sequence[int], dtype: Any = None) -> tf.Tensor:
        del shape
        return tf.stack([tf.cast(x.initial_value(), dtype) for x in stand_ins])

    return initializer


class _StackedRegularizer(keras.regularizers.Regularizer):
    """A regularizer of each slice by itself. Keras 3.13 takes no other callable."""

    def __init__(self, regularizer: Callable):
        self.regularizer = regularizer

    def __call__(self, stacked: tf.Tensor) -> tf.Tensor:
        return tf.add_n([self.regularizer(w) for w in tf.unstack(stacked)])


def stacked_regularizer(
    regularizer: Callable | None,
) -> keras.regularizers.Regularizer | None:
    """Returns a regularizer of each slice by itself."""
    return None if regularizer is None else _StackedRegularizer(regularizer)


def stacked_constraint(constraint: Callable | None) -> Callable | None:
    """Returns a constraint of each slice by itself."""
    if constraint is None:
        return None
    return lambda stacked: tf.stack([constraint(w) for w in tf.unstack(stacked)])


def variables_by_kind(blocks: Blocks) -> tuple[list, list, list]:
    """Returns the weights, the other variables (seeds) and the metrics of blocks."""
    weights = [v for block in blocks for v in block.weights]
    known = {id(v) for v in weights}
    seeds = [v for block in blocks for v in block.variables if id(v) not in known]
    return weights, seeds, [metric for block in blocks for metric in block.metrics]


def block_variables(blocks: Blocks) -> list[keras.Variable]:
    """Returns all variables of blocks: weights, seeds, then those of metrics."""
    weights, seeds, metrics = variables_by_kind(blocks)
    return [*weights, *seeds, *(v for metric in metrics for v in metric.variables)]


def check_same_variables(rows: Sequence[Sequence[keras.Variable]]) -> None:
    """Raises ValueError unless all rows have the same names, shapes and dtypes."""
    shapes = [[(v.name, tuple(v.shape), v.dtype) for v in row] for row in rows]
    for row in shapes[1:]:
        if row != shapes[0]:
            differing = set(row) ^ set(shapes[0])
            raise ValueError(
                "Stacked blocks must have the same weights. Received: "
                f"{len(row)} and {len(shapes[0])} variables, only in one of them "
                f"{sorted(differing)}"
            )


class _Seeds(SeedGeneratorOfState):
    """States `[count, 2]` of the same generator of each repetition.

    It is a `SeedGenerator` so that Keras counts the state among a layer's seeds, not
    among its weights.
    """

    def __init__(self, each: Sequence[keras.Variable]):
        state = keras.Variable(
            stacked_initializer(each),
            shape=(len(each), *each[0].shape),
            dtype=each[0].dtype,
            trainable=False,
            name=each[0].name,
        )
        super().__init__(state, name=each[0].path.split("/")[-2])

    def next(self, ordered: bool = True) -> tf.Tensor:
        raise NotImplementedError(
            "Seeds of a Stacked layer must be drawn by its blocks. "
            f"Received: a call of {self.name!r}"
        )


class _StackedMetric(StepMetric):
    """A metric of each repetition as one, with the names that each of them reports.

    Args:
        each: The metrics; their variables are placeholders.
    """

    def __init__(self, each: Sequence[keras.metrics.Metric]):
        super().__init__(name=f"stacked_{each[0].name}", dtype="float32")
        self._each = Untracked(list(each))
        for variables in zip(*(metric.variables for metric in each), strict=True):
            like = variables[0]
            self.add_variable(
                (len(each), *like.shape),
                stacked_initializer(variables),
                dtype=like.dtype,
                name=like.name,
            )

    def update_state(self, counts: Sequence[tf.Tensor | None]) -> None:
        """Adds its count to each variable; None adds nothing."""
        for variable, count in zip(self.variables, counts, strict=True):
            if count is not None:
                variable.assign_add(count)

    def result(self) -> dict[str, tf.Tensor]:
        self.count_deferred()
        values = [tf.unstack(value) for value in stored_values(self.variables)]
        results = {}
        for metric, own in zip(
            self._each.value, zip(*values, strict=True), strict=True
        ):
            with keras.StatelessScope(list(zip(metric.variables, own, strict=True))):
                result = metric.result()
            result = result if isinstance(result, dict) else {metric.name: result}
            results.update({f"{self.qualifier}{n}": x for n, x in result.items()})
        return results
