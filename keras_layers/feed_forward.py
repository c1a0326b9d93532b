"""The dense position-wise feed-forward layer."""

from typing import Any

import keras
import tensorflow as tf

from gshard_tf import annotate
from keras_layers._mlp import MLP
from keras_layers._seeds import child_initializer
from keras_layers._shapes import at_each_position, check_positions, position_axes


@keras.saving.register_keras_serializable(package="gshard_tf")
class FeedForward(MLP):
    """`wo . activation(wi . x)` at each position, without biases as in the paper.

    Inputs are `[..., M]`: `[B, M]`, `[B, L, M]`, `[B, H, W, M]`; any dtype, which is
    cast to the layer's.

    With `gated`: `wo . (activation(wi_gate . x) * (wi . x))` (GLU variants, arXiv
    2002.05202).

    Args:
        hidden_dim: H. The paper: 8 times the model width.
        activation: Of the hidden layer.
        dropout: Rate on the hidden layer, during training.
        kernel_initializer: Of all weights.
        gated: Whether the hidden layer is gated: half as much computation again, so
            lower H to two thirds for the same cost.
        seed: Seed of the dropout.

    Raises:
        ValueError: for an argument out of its range, or inputs without a batch.
    """

    def __init__(
        self,
        hidden_dim: int,
        activation: Any = "relu",
        dropout: float = 0.0,
        kernel_initializer: Any = "lecun_uniform",
        gated: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            hidden_dim, activation, dropout, kernel_initializer, gated, seed, **kwargs
        )
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        check_positions(self, input_shape, 2, "[..., width]")
        self.add_weights(input_shape[-1], child_initializer)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """`inputs` `[..., M]` -> `[..., M]`."""
        inputs = tf.cast(inputs, self.compute_dtype)
        names = position_axes(len(inputs.shape))
        # [..., H]
        hidden = self.hidden(lambda weight: at_each_position(inputs, weight))
        hidden = annotate(hidden, (*names, "mlp"))
        hidden = self.dropout(hidden, training=training)
        outputs = at_each_position(hidden, self.wo)  # [..., M]
        return annotate(outputs, (*names, "embed"))
