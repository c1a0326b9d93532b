"""Bringing the real tokens of a batch together, before it is cut into groups."""

import tensorflow as tf


class Packing:
    """Moves real tokens to the front of the batch, in their order, and back.

    Args:
        mask: `[..., L]`, False for padding.
    """

    def __init__(self, mask: tf.Tensor):
        padding = tf.logical_not(tf.reshape(tf.cast(mask, tf.bool), [-1]))  # [T]
        self._order = tf.argsort(tf.cast(padding, tf.int32), stable=True)
        self._place = tf.argsort(self._order)  # the inverse permutation
        self._rank = len(mask.shape)

    def together(self, x: tf.Tensor) -> tf.Tensor:
        """`[..., L, ...]` -> the same shape, padding last."""
        return self._permuted(x, self._order, self._place)

    def apart(self, x: tf.Tensor) -> tf.Tensor:
        """The way back."""
        return self._permuted(x, self._place, self._order)

    def _permuted(
        self, x: tf.Tensor, index: tf.Tensor, inverse: tf.Tensor
    ) -> tf.Tensor:
        @tf.custom_gradient
        def move(flat):
            # A gather both ways: the gradient of one would be a scatter.
            return tf.gather(flat, index), lambda d_flat: tf.gather(d_flat, inverse)

        moved = move(tf.reshape(x, [-1, *x.shape[self._rank :]]))
        moved = tf.reshape(moved, tf.shape(x))
        moved.set_shape(x.shape)
        return moved
