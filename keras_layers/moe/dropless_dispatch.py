"""Dropless dispatch: rows sorted by expert, instead of buffers with a capacity.

MegaBlocks (arXiv 2211.15841). An expert computes the rows that it gets and no empty
slots, so nothing is dropped and nothing is computed in vain.
"""

from typing import Any

import tensorflow as tf

from gshard_tf import RaggedDispatch, annotate
from keras_layers._shapes import static_shape
from keras_layers.moe.experts import Experts
from keras_layers.routing.capacity import DROPLESS
from keras_layers.routing.expert_choice import ExpertChoiceRouter
from keras_layers.routing.routing import Routing, TokenChoiceRouting


def check_router(router: Any) -> None:
    """Raises ValueError unless `router` lets tokens choose, and drops none."""
    if isinstance(router, ExpertChoiceRouter):
        raise ValueError(
            'The router must let tokens choose experts with dispatcher="dropless". '
            f"Received: router={router!r}"
        )
    # A custom router need not have them.
    factors = {
        name: getattr(router, name, None)
        for name in ("capacity_factor", "eval_capacity_factor")
    }
    if not set(factors.values()) <= {None, DROPLESS}:
        raise ValueError(
            'A router for dispatcher="dropless" must have a capacity_factor of '
            f'"{DROPLESS}". Received: {factors}'
        )


def apply_dropless(
    tokens: tf.Tensor, routing: Routing, experts: Experts, training: bool | None
) -> tf.Tensor:
    """Dispatches tokens `[G, S, M]` to the experts, and combines: `[G, S, M]`.

    Choices that the router did not dispatch, such as those of padding, cost nothing.

    Raises:
        ValueError: for a routing in which experts choose, or as `RaggedDispatch` does.
    """
    if not isinstance(routing, TokenChoiceRouting):
        raise ValueError(
            'The router must let tokens choose experts with dispatcher="dropless". '
            f"Received: {type(routing).__name__}"
        )
    groups, size, width = static_shape(tokens)
    choices = routing.expert_index.shape[-1]
    expert_index = tf.where(
        routing.dispatched, routing.expert_index, routing.num_experts
    )
    expert_index = tf.reshape(expert_index, [groups * size, choices])  # [T, K]
    dispatch = RaggedDispatch(expert_index, routing.num_experts)
    rows = dispatch.rows(tf.reshape(tokens, [groups * size, width]))  # [R, M]
    rows = experts(rows, training=training, ragged=dispatch)
    outputs = dispatch.combine(rows)  # [T, K, M]
    weight = tf.reshape(routing.weight, [groups * size, choices])
    outputs = tf.einsum("TK,TKM->TM", tf.cast(weight, outputs.dtype), outputs)
    # Added where the rows are, so that no device sends more than its tokens' outputs.
    outputs = annotate(outputs, ("expert_row", "embed"))
    outputs = tf.reshape(outputs, [groups, size, width])
    return annotate(outputs, ("group", None, "embed"))
