"""Grouping: tokens `[..., L, M]` to groups `[G, S, M]`, and back."""

import tensorflow as tf

from keras_layers._shapes import static_shape


def to_groups(
    inputs: tf.Tensor, mask: tf.Tensor | None, size: int | None
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Returns `inputs` `[..., L, M]` as `[G, S, M]`, and its mask as `[G, S]`.

    Args:
        inputs: The tokens.
        mask: `[..., L]` bool, False for padding; or None.
        size: S. The last group is filled up with padding. None: L, each row of the
            batch is a group.
    """
    if mask is not None:
        mask = tf.cast(mask, tf.bool)
    if size is None:
        if len(inputs.shape) == 3:
            return inputs, mask
        length, width = static_shape(inputs)[-2:]
        if mask is not None:
            mask = tf.reshape(mask, [-1, length])
        return tf.reshape(inputs, [-1, length, width]), mask

    width = inputs.shape[-1]
    flat = tf.reshape(inputs, [-1, width])
    (count,) = static_shape(flat)[:1]
    missing = -count % size
    if not isinstance(missing, int) or missing:
        real = tf.ones([count], tf.bool) if mask is None else tf.reshape(mask, [-1])
        flat = tf.pad(flat, [[0, missing], [0, 0]])
        mask = tf.pad(real, [[0, missing]])
    if mask is not None:
        mask = tf.reshape(mask, [-1, size])
    return tf.reshape(flat, [-1, size, width]), mask


def ids_to_groups(token_ids: tf.Tensor | None, tokens: tf.Tensor) -> tf.Tensor | None:
    """Returns ids `[..., L]` as `[G, S]`, the groups of `tokens` `[G, S, M]`."""
    if token_ids is None:
        return None  # the router raises the error
    groups, size = static_shape(tokens)[:2]
    flat = tf.reshape(token_ids, [-1])
    flat = tf.pad(flat, [[0, groups * size - tf.size(flat)]])
    return tf.reshape(flat, [groups, size])


def from_groups(outputs: tf.Tensor, inputs: tf.Tensor, size: int | None) -> tf.Tensor:
    """Inverse of `to_groups`: `[G, S, M]` in the shape of `inputs`."""
    if size is None and len(inputs.shape) == 3:
        outputs.set_shape(inputs.shape)
        return outputs
    width = inputs.shape[-1]
    shape = tf.shape(inputs)
    flat = tf.reshape(outputs, [-1, width])
    flat = flat[: tf.reduce_prod(shape[:-1])]
    outputs = tf.reshape(flat, shape)
    outputs.set_shape(inputs.shape)
    return outputs


class Packing:
    """Moves real tokens to the front of the batch, in their order, and back.

    Args:
        mask: `[..., L]`, False for padding.
    """

    def __init__(self, mask: tf.Tensor):
        padding = tf.logical_not(tf.reshape(tf.cast(mask, tf.bool), [-1]))  # [T]
        self._order = tf.argsort(tf.cast(padding, tf.int32), stable=True)
        self._inverse = tf.argsort(self._order)  # the inverse permutation
        self._rank = len(mask.shape)

    def pack(self, x: tf.Tensor) -> tf.Tensor:
        """`[..., L, ...]` -> the same shape, padding last."""
        return self._permuted(x, self._order, self._inverse)

    def unpack(self, x: tf.Tensor) -> tf.Tensor:
        """Inverse of `pack`."""
        return self._permuted(x, self._inverse, self._order)

    def _permuted(
        self, x: tf.Tensor, index: tf.Tensor, inverse: tf.Tensor
    ) -> tf.Tensor:
        @tf.custom_gradient
        def permuted(flat):
            # A gather both ways: the gradient of one would be a scatter.
            return tf.gather(flat, index), lambda d_flat: tf.gather(d_flat, inverse)

        moved = permuted(tf.reshape(x, [-1, *x.shape[self._rank :]]))
        moved = tf.reshape(moved, tf.shape(x))
        moved.set_shape(x.shape)
        return moved
