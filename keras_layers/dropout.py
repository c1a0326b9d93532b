"""Dropout with a mask that partitions as the activations do."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from gshard_tf import random
from keras_layers._arguments import check_int, check_rate


@keras.saving.register_keras_serializable(package="gshard_tf")
class Dropout(keras.layers.Layer):
    """`keras.layers.Dropout` with random numbers that partition.

    The generator of TensorFlow's own dropout is an XLA operation that the partitioner
    does not split: every device would make the mask of the global batch. Here every
    device makes its own part, and the mask does not depend on the number of devices.

    Args:
        rate: Share of the values set to 0, in [0, 1); the rest are scaled by
            `1 / (1 - rate)`. The paper uses 0.1 throughout (section 4.2).
        noise_shape: Shape of the mask, broadcast to the inputs; None in it stands for
            the inputs' own dimension. None: the inputs' shape.
        seed: Seed of the layer's generator.
        batch_dim: The dimension of examples: several replicas of `tf.distribute` use
            the mask that one device would for all their examples.

    Raises:
        ValueError: for a rate outside [0, 1).
    """

    def __init__(
        self,
        rate: float,
        noise_shape: Sequence[int | None] | None = None,
        seed: int | None = None,
        batch_dim: int = 0,
        **kwargs: Any,
    ):
        rate = check_rate("rate", rate)
        super().__init__(**kwargs)
        self.rate = rate
        self.seed = seed
        self.batch_dim = int(batch_dim)
        self.noise_shape = None
        if noise_shape is not None:
            self.noise_shape = tuple(
                None if n is None else check_int("noise_shape", n, 1)
                for n in noise_shape
            )
        if rate > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True
        self.built = True

    def call(
        self,
        inputs: tf.Tensor,
        training: bool | None = None,
        positions: tf.Tensor | None = None,
        rows: int | tf.Tensor = 1,
    ) -> tf.Tensor:
        """Drops values of `inputs`.

        With `positions`, distinct ints, one for each row of `inputs` `[R, H]`, a row
        has the mask of its position, wherever it stands. `rows` is the number of
        neighbors along `batch_dim` that are of one example.
        """
        if not training or self.rate == 0:
            return inputs
        dynamic = tf.shape(inputs)
        shape = [dynamic[i] if n is None else n for i, n in enumerate(inputs.shape)]
        batch_dim: int | None = self.batch_dim if positions is None else 0
        if self.noise_shape is not None:
            if len(self.noise_shape) != len(shape):
                raise ValueError(
                    f"noise_shape must have one entry per dimension of the inputs, "
                    f"{len(shape)}. Received: noise_shape={self.noise_shape}"
                )
            shape = [
                own if given is None else given
                for own, given in zip(shape, self.noise_shape, strict=True)
            ]
            if self.noise_shape[self.batch_dim] is not None:
                batch_dim = None  # one mask for all examples
        uniforms = random.uniform(
            self.seed_generator.next(), shape, batch_dim, positions, rows
        )
        scaled = inputs * tf.cast(1.0 / (1.0 - self.rate), inputs.dtype)
        return tf.where(uniforms >= self.rate, scaled, tf.zeros([], inputs.dtype))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            rate=self.rate,
            noise_shape=self.noise_shape,
            seed=self.seed,
            batch_dim=self.batch_dim,
        )
        return config
