"""The dense position-wise feed-forward layer."""

from typing import Any

import keras
import tensorflow as tf

from gshard_tf import annotate, name_axes
from keras_layers._arguments import check_int
from keras_layers._seeds import child_initializer
from keras_layers._shapes import at_each_position, check_positions, positions
from keras_layers.dropout import Dropout


@keras.saving.register_keras_serializable(package="gshard_tf")
class FeedForward(keras.layers.Layer):
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
        hidden_dim = check_int("hidden_dim", hidden_dim, 1)
        super().__init__(**kwargs)
        self.hidden_dim = hidden_dim
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.gated = bool(gated)
        self.seed = seed
        self.dropout = Dropout(dropout, seed=seed, dtype=self.dtype_policy)
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        check_positions(self, input_shape, 2, "[..., width]")
        model_dim = input_shape[-1]
        inward = ["wi", "wi_gate"] if self.gated else ["wi"]
        for name in inward:
            weight = self.add_weight(
                name=name,
                shape=(model_dim, self.hidden_dim),
                initializer=child_initializer(self.kernel_initializer, name),
            )
            setattr(self, name, name_axes(weight, ("embed", "mlp")))
        self.wo = name_axes(
            self.add_weight(
                name="wo",
                shape=(self.hidden_dim, model_dim),
                initializer=child_initializer(self.kernel_initializer, "wo"),
            ),
            ("mlp", "embed"),
        )

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """`inputs` `[..., M]` -> `[..., M]`."""
        inputs = tf.cast(inputs, self.compute_dtype)
        names = positions(len(inputs.shape))
        hidden = at_each_position(inputs, self.wi)  # [..., H]
        if self.gated:
            gate = at_each_position(inputs, self.wi_gate)
            hidden = self.activation(gate) * hidden
        else:
            hidden = self.activation(hidden)
        hidden = annotate(hidden, (*names, "mlp"))
        hidden = self.dropout(hidden, training=training)
        outputs = at_each_position(hidden, self.wo)  # [..., M]
        return annotate(outputs, (*names, "embed"))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            hidden_dim=self.hidden_dim,
            activation=keras.activations.serialize(self.activation),
            dropout=self.dropout.rate,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
            gated=self.gated,
            seed=self.seed,
        )
        return config
