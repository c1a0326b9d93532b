"""Context parallelism: attention over a length that is split over devices.

Where rules split `length`, XLA's partitioner gathers keys and values, and each device
stores the scores of its own queries with all keys. There are two ways to avoid that:
the ring, and the all-to-all from lengths to heads and back (DeepSpeed-Ulysses, Jacobs
et al., arXiv 2309.14509).
"""

import keras
import tensorflow as tf

from gshard_tf import active_mesh, annotate, ring_attention
from keras_layers.dropout import Dropout

KINDS = (None, "ring", "all_to_all")


def check_context_parallel(kind: str | None) -> str | None:
    """Returns a kind of context parallelism; raises ValueError for an unknown one."""
    if kind not in KINDS:
        raise ValueError(
            f"`context_parallel` must be one of {KINDS}. "
            f"Received: context_parallel={kind!r}"
        )
    return kind


def length_is_split(*tensors: tf.Tensor) -> bool:
    """Returns whether the rules of an active mesh split the length of tensors.

    Not while only shapes matter: in Keras's functional construction, and in a trace
    whose shapes are unknown.
    """
    active = active_mesh()
    if active is None or active.rules.mesh_axis("length") is None:
        return False
    return all(
        tf.is_symbolic_tensor(tensor) and tensor.shape.is_fully_defined()
        for tensor in tensors
        if not isinstance(tensor, keras.KerasTensor)
    )


def split_heads_instead(*tensors: tf.Tensor) -> list[tf.Tensor]:
    """Lays `[B, L, N, D]` out with its heads split as its length was, and that whole.

    An all-to-all each.

    Raises:
        ValueError: when rules split heads as well, or heads do not divide by the
            devices that split the length.
    """
    active = active_mesh()
    heads = tensors[0].shape[2]
    rules = None if active is None else active.rules
    devices = 1 if active is None else active.parts("length")
    heads_axis = None if rules is None else rules.mesh_axis("heads")
    if heads_axis is not None or heads % devices:
        raise ValueError(
            'context_parallel="all_to_all" needs heads that no rule splits, and whose '
            f"number divides by the {devices} devices that split the length. "
            f"Received: {heads} heads, rules={rules}"
        )
    return [annotate(tensor, ("batch", None, "length", None)) for tensor in tensors]


def attend_in_ring(
    dropout: Dropout,
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    visible: tf.Tensor | None,
    segments: tuple[tf.Tensor, tf.Tensor] | None,
    causal: bool,
    training: bool | None,
) -> tf.Tensor:
    """Returns `gshard_tf.ring_attention` with the masks of `MultiHeadAttention`.

    Args:
        dropout: That of the attention weights.
        query: `[B, T, N, D]`, scaled.
        key: `[B, L, N, D]`.
        value: `[B, L, N, D]`.
        visible: `[B, 1, 1, L]` bool, False for padding, or None.
        segments: Ids of queries `[B, T]` and of keys `[B, L]`, then without `visible`.
        causal: Whether a position sees only those up to it.
        training: Whether to drop out.
    """
    if segments is None and visible is not None:
        queries = tf.ones(query.shape[:2], tf.int32)
        segments = (queries, tf.cast(visible[:, 0, 0], tf.int32))
    rate, seed = 0.0, None
    if training and dropout.rate:
        rate, seed = dropout.rate, dropout.seed_generator.next()
    return ring_attention(query, key, value, causal, segments, rate, seed)
