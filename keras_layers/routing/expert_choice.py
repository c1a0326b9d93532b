"""Expert choice routing: experts take tokens."""

from typing import Any

import keras
import tensorflow as tf

from keras_layers.routing.router import Router
from keras_layers.routing.routing import ExpertChoiceRouting


@keras.saving.register_keras_serializable(package="gshard_tf")
class ExpertChoiceRouter(Router):
    """Each expert takes the C tokens of a group that score highest with it.

    Expert Choice Routing (arXiv 2202.09368): load is even by construction, so there is
    no balancing loss; a token gets any number of experts, or none. The weight of
    an expert's output is its softmax gate.

    Not for a causal decoder: whether an expert takes a token depends on the tokens
    after it, so training sees the future and generation, which cannot, routes
    otherwise (there, each token is a group of its own and all experts take it). A
    `Transformer` refuses it in its decoder unless `allow_causal` is set.

    Args:
        num_experts: E, at least 2.
        capacity_factor: C = ceil(S * factor / E): `factor` is the mean number of
            experts per token. The paper: 2.
        allow_causal: Whether a causal decoder accepts it all the same.
        **kwargs: Of `Router`.

    Raises:
        ValueError: for an argument out of its range.
    """

    is_causal = False

    def __init__(
        self,
        num_experts: int,
        capacity_factor: float | str = 2.0,
        allow_causal: bool = False,
        **kwargs: Any,
    ):
        super().__init__(num_experts, capacity_factor, **kwargs)
        self._check_enough_experts(1)
        self.allow_causal = bool(allow_causal)

    def route(
        self,
        logits: tf.Tensor,
        capacity: int | tf.Tensor,
        mask: tf.Tensor | None,
        training: bool | None,
        limit: tf.Tensor | None = None,
    ) -> tuple[ExpertChoiceRouting, tf.Tensor, tf.Tensor]:
        gates = tf.nn.softmax(logits, axis=-1)  # [G, S, E]
        scores = tf.transpose(gates, [0, 2, 1])  # [G, E, S]
        ranked = tf.stop_gradient(scores)
        # Padding and masked experts last, and not taken even if there is room.
        takes = tf.ones_like(ranked, tf.bool)
        if mask is not None:
            takes = tf.logical_and(takes, tf.cast(mask, tf.bool)[:, None, :])
        if self.masked_experts:
            takes = tf.logical_and(takes, tf.transpose(logits, [0, 2, 1]) > -1e29)
        ranked = tf.where(takes, ranked, -1.0)
        # A NaN compares with nothing: it would upset the order of the others.
        ranked = tf.where(tf.math.is_nan(ranked), 0.0, ranked)
        order = tf.argsort(ranked, axis=-1, direction="DESCENDING", stable=True)
        rank = tf.argsort(order, axis=-1)  # the inverse permutation, [G, E, S]
        room = capacity if limit is None else limit[:, None, None]
        chosen = tf.logical_and(takes, rank < room)  # [G, E, S]
        token_index = order[..., :capacity]  # [G, E, C]
        filled = tf.gather(chosen, token_index, batch_dims=2)
        weight = _take(scores, token_index, rank, chosen)
        routing = ExpertChoiceRouting(
            token_index=tf.where(filled, token_index, -1),
            weight=tf.where(filled, weight, 0.0),
            chosen=tf.transpose(chosen, [0, 2, 1]),
            limit=limit,
        )
        return routing, gates, tf.zeros([], tf.float32)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(allow_causal=self.allow_causal)
        return config


def _take(
    scores: tf.Tensor, token_index: tf.Tensor, rank: tf.Tensor, chosen: tf.Tensor
) -> tf.Tensor:
    """`scores` `[G, E, S]` at `token_index` `[G, E, C]`, the gradient by gather too."""

    @tf.custom_gradient
    def take(values):
        def gradient(d_taken):
            last = tf.shape(token_index)[-1] - 1
            back = tf.gather(d_taken, tf.minimum(rank, last), batch_dims=2)
            return tf.where(chosen, back, 0.0)

        return tf.gather(values, token_index, batch_dims=2), gradient

    return take(scores)
