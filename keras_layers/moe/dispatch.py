"""Dispatchers: move tokens to the experts' buffers and back.

Both annotate the same pair of layouts, and that pair is the all-to-all: buffers are
computed split over groups and passed to the experts split over experts. Forward this
costs one all-to-all each way, and backward one each way.
"""

from typing import Protocol

import tensorflow as tf

from gshard_tf import annotate
from keras_layers._padding import zero_padding
from keras_layers._shapes import static_shape
from keras_layers.moe.gathers import gathers_of
from keras_layers.routing.routing import ExpertChoiceRouting, Routing


class Dispatcher(Protocol):
    """Interface of a dispatcher, as `MoELayer` uses it."""

    def dispatch(self, inputs: tf.Tensor, routing: Routing) -> tf.Tensor:
        """`[G, S, M]` -> the experts' buffers `[E, G, C, M]`; empty slots are 0."""

    def combine(self, expert_outputs: tf.Tensor, routing: Routing) -> tf.Tensor:
        """`[E, G, C, M]` -> the weighted sum for each token, `[G, S, M]`."""


class EinsumDispatcher:
    """Dispatch and combine as matmuls with one-hot tensors, as in the paper.

    Algorithm 2 of the paper. The tensors `[G, S, E, C]` hold 2S numbers per token
    and the matmuls cost S / H of the experts' own FLOPs (at a capacity factor of 2),
    so keep groups small. It exists as the form that the paper measured, and as a
    check of `IndexDispatcher`.
    """

    def dispatch(self, inputs: tf.Tensor, routing: Routing) -> tf.Tensor:
        mask = self._one_hot(routing, inputs, weighted=False)
        buffers = _finite_einsum("GSEC,GSM->GECM", "GSEC,GS->GEC", mask, inputs)
        return _to_experts(buffers)

    def combine(self, expert_outputs: tf.Tensor, routing: Routing) -> tf.Tensor:
        buffers = _to_groups(expert_outputs)  # [G, E, C, M]
        combine = self._one_hot(routing, buffers, weighted=True)
        outputs = _finite_einsum("GSEC,GECM->GSM", "GSEC,GEC->GS", combine, buffers)
        return annotate(outputs, ("group", None, "embed"))

    @staticmethod
    def _one_hot(routing: Routing, like: tf.Tensor, weighted: bool) -> tf.Tensor:
        """1, or the weight, at each (token, expert, slot) in use: `[G, S, E, C]`."""
        dtype = like.dtype
        if isinstance(routing, ExpertChoiceRouting):
            tokens = static_shape(routing.chosen)[1]
            # A token of -1 is a row of zeros.
            hot = tf.one_hot(routing.token_index, tokens, dtype=dtype)  # [G, E, C, S]
            if weighted:
                # Not a product: a weight that is NaN is that of one token.
                weight = tf.cast(routing.weight, dtype)[..., None]
                hot = tf.where(hot > 0, weight, tf.zeros([], dtype))
            return tf.transpose(hot, [0, 3, 1, 2])
        values = tf.cast(routing.weight if weighted else routing.dispatched, dtype)
        expert = tf.one_hot(routing.expert_index, routing.num_experts, dtype=dtype)
        # A slot of -1 is a row of zeros.
        slot = tf.one_hot(routing.slot, routing.capacity, dtype=dtype)
        expert = expert * values[..., None]  # [G, S, K, E]
        return tf.einsum("GSKE,GSKC->GSEC", expert, slot)


class IndexDispatcher:
    """Dispatch and combine by index: activations move once, by gathers.

    Small integer maps per group hold the token of each slot, and the slots of each
    token's outputs. Both directions and both gradients gather by them: no
    activation is ever scattered, which partitions well and has no unpredictable order
    of additions.
    """

    def dispatch(self, inputs: tf.Tensor, routing: Routing) -> tf.Tensor:
        buffers = gathers_of(routing).to_slots(inputs)  # [G, E*C, M]
        groups, width = tf.shape(inputs)[0], inputs.shape[-1]
        buffers = tf.reshape(
            buffers, [groups, routing.num_experts, routing.capacity, width]
        )
        return _to_experts(buffers)

    def combine(self, expert_outputs: tf.Tensor, routing: Routing) -> tf.Tensor:
        buffers = _to_groups(expert_outputs)  # [G, E, C, M]
        shape = tf.shape(buffers)
        # The width by number: -1 would be undefined for an empty batch.
        width = buffers.shape[-1]
        buffers = tf.reshape(buffers, [shape[0], shape[1] * shape[2], width])
        outputs = gathers_of(routing).to_tokens(buffers)  # [G, S, M]
        return annotate(outputs, ("group", None, "embed"))


def _finite_einsum(
    product: str, places: str, weights: tf.Tensor, rows: tf.Tensor
) -> tf.Tensor:
    """Returns `einsum(product, weights, rows)`, with NaN only where a NaN has a weight.

    0 times a NaN or an infinity is NaN: one such row would spread to all results. So it
    is left out, and results with a weight for it become NaN.

    Args:
        product: Einsum of the rows `[..., M]`.
        places: The same of one number per row, without M.
        weights: `[G, S, E, C]`.
        rows: `[G, S, M]` or `[G, E, C, M]`.
    """
    finite = tf.reduce_all(tf.math.is_finite(rows), axis=-1)
    results = tf.einsum(product, weights, zero_padding(rows, finite))
    hit = tf.einsum(
        places,
        tf.cast(tf.not_equal(weights, 0), rows.dtype),
        tf.cast(tf.logical_not(finite), rows.dtype),
    )
    nan = tf.constant(float("nan"), rows.dtype)
    return tf.where((hit > 0)[..., None], nan, results)


def _to_experts(buffers: tf.Tensor) -> tf.Tensor:
    """`[G, E, C, M]` split over groups -> `[E, G, C, M]` split over experts.

    Where groups are split over more devices than experts, their outer part stays.
    """
    buffers = annotate(buffers, ("group", None, None, "embed"))
    return annotate(
        tf.transpose(buffers, [1, 0, 2, 3]), ("expert", "expert_group", None, "embed")
    )


def _to_groups(buffers: tf.Tensor) -> tf.Tensor:
    """Inverse of `_to_experts`: `[E, G, C, M]` -> `[G, E, C, M]`."""
    buffers = annotate(buffers, ("expert", "expert_group", None, "embed"))
    return annotate(tf.transpose(buffers, [1, 0, 2, 3]), ("group", None, None, "embed"))
