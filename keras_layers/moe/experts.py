"""The experts: E feed-forward networks as batched matmuls."""

from collections.abc import Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf

from gshard_tf import annotate
from keras_layers._arguments import check_int
from keras_layers._mlp import MLP
from keras_layers._shapes import static_shape
from keras_layers.initializers import per_expert_fan


class RaggedRows(Protocol):
    """Rows that are sorted by expert, as many for each as there are."""

    def dot(
        self, rows: tf.Tensor, weight: keras.Variable, axes: Sequence[str]
    ) -> tf.Tensor:
        """`rows` `[R, M]` by the experts' `weight` `[E, M, H]` -> `[R, H]`."""

    def choices(self) -> tf.Tensor:
        """The number of the choice that each row is for, `[R]` int32."""


@keras.saving.register_keras_serializable(package="gshard_tf")
class Experts(MLP):
    """E feed-forward networks side by side: `FFN_e(x) = wo_e . activation(wi_e . x)`.

    With `gated`: `wo_e . (activation(wi_gate_e . x) * (wi_e . x))`. No biases, as in
    the paper: an empty slot then stays 0 with the usual activations.

    Args:
        num_experts: E.
        hidden_dim: H.
        activation: Of the hidden layer.
        dropout: Rate on the hidden layer, during training.
        kernel_initializer: Of all weights; fans are counted within one expert.
        gated: Whether the hidden layer is gated.
        seed: Seed of the dropout.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        activation: Any = "relu",
        dropout: float = 0.0,
        kernel_initializer: Any = "lecun_uniform",
        gated: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ):
        num_experts = check_int("num_experts", num_experts, 1)
        # Of [E, G*C, H]: an expert's rows are the groups, one after the other.
        super().__init__(
            hidden_dim,
            activation,
            dropout,
            kernel_initializer,
            gated,
            seed,
            batch_dim=1,
            **kwargs,
        )
        self.num_experts = num_experts

    def build(self, input_shape: Any) -> None:
        if len(input_shape) != 4:
            raise ValueError(
                "Inputs of Experts must be buffers [experts, groups, capacity, width], "
                "as MoELayer makes them from tokens. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        leading = [(self.num_experts, "expert")]
        self.add_weights(input_shape[-1], per_expert_fan, leading)

    def call(
        self,
        inputs: tf.Tensor,
        training: bool | None = None,
        chosen: tf.Tensor | None = None,
        ragged: RaggedRows | None = None,
    ) -> tf.Tensor:
        """`inputs` `[E, G, C, M]` -> `[E, G, C, M]`.

        With `chosen` `[R]` ints the rows of `inputs` `[R, G, C, M]` are for these
        experts, and only their weights are read. With `ragged` the inputs are
        rows `[R, M]`, each for the expert that it says.
        """
        if ragged is not None:
            return self._of_rows(inputs, training, ragged)
        experts, groups, capacity, width = static_shape(inputs)

        def matmul(rows: tf.Tensor, weight: keras.Variable) -> tf.Tensor:
            if chosen is not None:
                weight = tf.gather(weight, chosen)
            return tf.matmul(rows, weight)

        # Batched products of [E, G*C, .], not einsums over G and C: the gradients of
        # those with respect to the weights make XLA transpose [E, G*C, H] in memory.
        rows = tf.reshape(inputs, [experts, groups * capacity, width])  # [E, G*C, M]
        rows = annotate(rows, ("expert", "expert_group", "embed"))
        hidden = self.hidden(lambda weight: matmul(rows, weight))  # [E, G*C, H]
        hidden = annotate(hidden, ("expert", "expert_group", "mlp"))
        # Rows of a group are neighbors: a microbatch has the masks of its own groups.
        hidden = self.dropout(hidden, training=training, rows=capacity)
        outputs = matmul(hidden, self.wo)  # [E, G*C, M]
        return tf.reshape(outputs, [experts, groups, capacity, width])

    def _of_rows(
        self, rows: tf.Tensor, training: bool | None, ragged: RaggedRows
    ) -> tf.Tensor:
        hidden = self.hidden(
            lambda weight: ragged.dot(rows, weight, ("expert", "embed", "mlp"))
        )
        if training and self.dropout.rate:
            hidden = self.dropout(hidden, training=training, positions=ragged.choices())
        return ragged.dot(hidden, self.wo, ("expert", "mlp", "embed"))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(num_experts=self.num_experts)
        return config
