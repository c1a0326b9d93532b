"""Base of the feed-forward layers, of one network or of many side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from gshard_tf import name_axes
from keras_layers._arguments import check_int
from keras_layers.dropout import Dropout


class MLP(keras.layers.Layer):
    """Weights, hidden activation and config of `FeedForward` and `Experts`.

    Args:
        hidden_dim: H.
        activation: Of the hidden layer.
        dropout: Rate on the hidden layer, during training.
        kernel_initializer: Of all weights.
        gated: Whether the hidden layer is gated.
        seed: Seed of the dropout.
        batch_dim: Dimension of the examples in the hidden layer.
    """

    def __init__(
        self,
        hidden_dim: int,
        activation: Any,
        dropout: float,
        kernel_initializer: Any,
        gated: bool,
        seed: int | None,
        batch_dim: int = 0,
        **kwargs: Any,
    ):
        hidden_dim = check_int("hidden_dim", hidden_dim, 1)
        super().__init__(**kwargs)
        self.hidden_dim = hidden_dim
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.gated = bool(gated)
        self.seed = seed
        self.dropout = Dropout(
            dropout, seed=seed, batch_dim=batch_dim, dtype=self.dtype_policy
        )

    def add_weights(
        self,
        model_dim: int,
        initializer_for: Callable[[Any, str], Any],
        leading: Sequence[tuple[int, str]] = (),
    ) -> None:
        """Adds `wi`, `wi_gate` if gated, and `wo`, each with logical axes.

        Args:
            model_dim: M.
            initializer_for: From the layer's initializer and a weight's name to the
                weight's own initializer.
            leading: Size and logical axis of each dimension before the matrices'.
        """
        sizes, axes = [n for n, _ in leading], [axis for _, axis in leading]
        for name in ("wi", "wi_gate", "wo") if self.gated else ("wi", "wo"):
            matrix = [(model_dim, "embed"), (self.hidden_dim, "mlp")]
            (rows, row_axis), (columns, column_axis) = (
                matrix[::-1] if name == "wo" else matrix
            )
            weight = self.add_weight(
                name=name,
                shape=(*sizes, rows, columns),
                initializer=initializer_for(self.kernel_initializer, name),
            )
            setattr(self, name, name_axes(weight, (*axes, row_axis, column_axis)))

    def hidden(self, matmul: Callable[[keras.Variable], tf.Tensor]) -> tf.Tensor:
        """Hidden layer, where `matmul` multiplies the inputs by a weight."""
        hidden = matmul(self.wi)
        if self.gated:
            return self.activation(matmul(self.wi_gate)) * hidden
        return self.activation(hidden)

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
