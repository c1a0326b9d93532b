"""Hash routing: a token's id alone determines its expert."""

from typing import Any

import keras
import tensorflow as tf

from keras_layers._shapes import static_shape
from keras_layers.routing.assignment import assign
from keras_layers.routing.counting import choices_of_real
from keras_layers.routing.router import Router, RouterStats
from keras_layers.routing.routing import TokenChoiceRouting


def _mix(x: tf.Tensor) -> tf.Tensor:
    """Last step of MurmurHash3: every bit of `x` uint32 changes every other."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _uint32(shift)))
        x = x * _uint32(factor)
    return x


def _uint32(value: int) -> tf.Tensor:
    return tf.constant(value, tf.uint32)


@keras.saving.register_keras_serializable(package="gshard_tf")
class HashRouter(Router):
    """Each token goes to one expert, by a fixed hash of its id, with weight 1.

    Hash Layers (arXiv 2106.04426). Nothing is learned, so nothing collapses: a baseline
    for learned routers. Frequent ids make their experts busy, so watch `max_load`.

    `MoELayer` must be called with `token_ids`; `Transformer` does so by itself.

    Args:
        num_experts: E, at least 2.
        capacity_factor: C = ceil(S * factor / E).
        **kwargs: Of `Router`. `seed` selects the hash; None is 0. There are no logits
            to jitter, cap or initialize.

    Raises:
        ValueError: for an argument out of its range, or without `token_ids`.
    """

    uses_token_ids = True
    seed_is_a_choice = True

    def __init__(
        self, num_experts: int, capacity_factor: float | str = 1.25, **kwargs: Any
    ):
        super().__init__(num_experts, capacity_factor, **kwargs)
        if self.masked_experts or self.jitter or self.logit_cap:
            raise ValueError(
                "masked_experts, jitter and logit_cap must be unset in a HashRouter, "
                f"which has no logits. Received: masked_experts={self.masked_experts}, "
                f"jitter={self.jitter}, logit_cap={self.logit_cap}"
            )

    def build(self, input_shape: Any) -> None:
        """Adds no weights."""

    def call(
        self,
        inputs: tf.Tensor,
        mask: tf.Tensor | None = None,
        training: bool | None = None,
        token_ids: tf.Tensor | None = None,
    ) -> tuple[TokenChoiceRouting, RouterStats]:
        """Routes `inputs` `[G, S, M]` by `token_ids` `[G, S]`."""
        if token_ids is None:
            raise ValueError(
                "A HashRouter needs token ids: call MoELayer with token_ids of "
                f"the shape of its inputs without the width, {inputs.shape[:-1]}. "
                "Received: token_ids=None"
            )
        hashed = _mix(tf.cast(token_ids, tf.uint32) + _mix(_uint32(self.seed or 0)))
        # Without the highest bit, which would be the sign of an int32.
        hashed = tf.cast(tf.bitwise.right_shift(hashed, _uint32(1)), tf.int32)
        expert_index = hashed % self.num_experts
        expert_index = expert_index[..., None]  # [G, S, 1]
        requested = choices_of_real(expert_index, mask)
        routing = assign(
            expert_index,
            tf.ones_like(expert_index, tf.float32),
            requested,
            requested,
            self.num_experts,
            self.capacity(static_shape(inputs)[1], training),
            limit=self.limit(mask, training),
        )
        zero = tf.zeros([], tf.float32)
        return routing, RouterStats(zero, zero, tf.ones([], tf.float32))
