"""Shape of a pipeline, and tensors cut into microbatches and stages and put together.

Dimensions: P stages, U units of a stage, K microbatches, T = K + P - 1 ticks.
"""

from typing import NamedTuple

import tensorflow as tf

from gshard_tf import active_mesh, annotate, record_pipeline
from keras_layers._shapes import static_shape

# Axes of the tensors that go with tokens, `[B, L]` or `[B, L, M]`.
TOKEN_AXES = ("batch", "length", "embed")


class Pipeline(NamedTuple):
    """The shape of a pipeline.

    Attributes:
        stages: P.
        units: U, of each stage.
        microbatches: K.
    """

    stages: int
    units: int
    microbatches: int

    @property
    def ticks(self) -> int:
        """T, ticks of a pass."""
        return self.microbatches + self.stages - 1


def check_pipeline(
    name: str, count: int, microbatches: int, batch: int | None
) -> Pipeline:
    """Returns the pipeline of a stack: as many stages as devices that split "stage".

    Args:
        name: The stack's, for messages.
        count: How many units it has.
        microbatches: K.
        batch: B, or None where it is unknown.

    Raises:
        ValueError: for units or a batch that do not divide.
    """
    active = active_mesh()
    stages = 1 if active is None else active.parts("stage")
    if count % stages:
        raise ValueError(
            f"The {count} units of {name!r} (each of `moe_every` layers with experts, "
            "else of one) must divide by the stages of the pipeline, the devices over "
            f'which rules split "stage". Received: {count} units, {stages} stages'
        )
    if batch is not None and batch % microbatches:
        raise ValueError(
            "The batch must divide by `microbatches`. "
            f"Received: a batch of {batch}, microbatches={microbatches}"
        )
    record_pipeline(name, stages, microbatches)
    return Pipeline(stages, count // stages, microbatches)


def to_microbatches(x: tf.Tensor, count: int) -> tf.Tensor:
    """`[B, ...]` -> `[K, B / K, ...]`: microbatch k has the rows k, k + K, k + 2K, ...

    So each device keeps the rows that it has of the batch.
    """
    _, *rest = static_shape(x)
    x = tf.reshape(x, [-1, count, *rest])
    x = tf.transpose(x, [1, 0, *range(2, len(rest) + 2)])
    return annotate(x, (None, *TOKEN_AXES[: len(rest) + 1]))


def from_microbatches(x: tf.Tensor) -> tf.Tensor:
    """Inverse of `to_microbatches`."""
    _, _, *rest = static_shape(x)
    x = tf.transpose(x, [1, 0, *range(2, len(rest) + 2)])
    x = tf.reshape(x, [-1, *rest])
    return annotate(x, TOKEN_AXES[: len(rest) + 1])


def to_stages(x: tf.Tensor, pipeline: Pipeline) -> tf.Tensor:
    """`[P * U, ...]`, of all units in order -> `[U, P, ...]`."""
    _, *rest = static_shape(x)
    x = tf.reshape(x, [pipeline.stages, pipeline.units, *rest])
    return tf.transpose(x, [1, 0, *range(2, len(rest) + 2)])


def from_stages(x: tf.Tensor) -> tf.Tensor:
    """Inverse of `to_stages`."""
    _, _, *rest = static_shape(x)
    x = tf.transpose(x, [1, 0, *range(2, len(rest) + 2)])
    return tf.reshape(x, [-1, *rest])
