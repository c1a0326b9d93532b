"""Decoding by attention position by position, over a cache of keys and values."""

from collections.abc import Iterable

import keras
import tensorflow as tf

from gshard_tf import annotate

KeysAndValues = dict[str, tf.Tensor]
DecodeKernels = dict[str, tf.Tensor]


class AttentionDecoding(keras.layers.Layer):
    """Base of `MultiHeadAttention` with the methods of a decoding loop.

    A subclass has the weights, `project`, `_weight` and `_attend`.
    """

    def project_memory(
        self, memory: tf.Tensor, kernels: DecodeKernels | None = None
    ) -> KeysAndValues:
        """Keys and values of `memory` for `cross_attend`, `[B, N, L, D]`."""
        projected = self.project(memory, kernels)
        return {name: _heads_first(x) for name, x in projected.items()}

    def decode_kernels(
        self, names: Iterable[str] = ("query", "key", "value", "output")
    ) -> DecodeKernels:
        """Weights as matrices `[M, N * D]` and `[N * D, M]`, for a decoding loop.

        Made before the loop: inside it XLA's CPU compiler fuses the reshape into the
        matmuls of a single row, and then runs down the columns, one multiplication at a
        time. (Greedy decoding at batch 1 took twice as long.)
        """
        inner = self.num_heads * self.key_dim
        return {
            name: tf.reshape(
                self._weight(name), [inner, -1] if name == "output" else [-1, inner]
            )
            for name in names
        }

    def cross_attend(
        self,
        inputs: tf.Tensor,
        projected: KeysAndValues,
        memory_mask: tf.Tensor | None = None,
        kernels: DecodeKernels | None = None,
    ) -> tf.Tensor:
        """Attends to the result of `project_memory`, without dropout: for decoding.

        Args:
            inputs: `[B, T, M]`.
            projected: Keys and values, `[B, N, L, D]`.
            memory_mask: `[B, L]` bool, False for padding.
            kernels: From `decode_kernels`, for more than one call.

        Returns:
            `[B, T, M]`.
        """
        visible = None
        if memory_mask is not None:
            visible = tf.cast(memory_mask, tf.bool)[:, None, None, :]
        return self._attend(inputs, projected, visible, False, "BNLD", kernels)

    def init_cache(
        self, batch_size: int | tf.Tensor, max_length: int, rows: int = 1
    ) -> KeysAndValues:
        """Empty cache of static length, `[B, N, max_length * rows, D]` twice.

        In the order of the matmuls, heads before positions and the rows of a position
        one after another: else each step would copy all of it, or write it twice.

        Args:
            batch_size: B.
            max_length: Positions.
            rows: Tokens per position: hypotheses that share one cache.
        """
        shape = [batch_size, self.num_heads, max_length * rows, self.key_dim]
        zeros = tf.zeros(shape, self.compute_dtype)
        zeros = annotate(zeros, ("batch", "heads", "length", "kv"))
        return {"key": zeros, "value": zeros}

    def decode(
        self,
        inputs: tf.Tensor,
        cache: KeysAndValues,
        index: int | tf.Tensor,
        visible: tf.Tensor | None = None,
        kernels: DecodeKernels | None = None,
    ) -> tuple[tf.Tensor, KeysAndValues]:
        """Runs one position of causal self-attention.

        Args:
            inputs: `[B, rows, M]`, the tokens at position `index`.
            cache: Keys and values of the positions before it.
            index: Int or scalar int32 tensor in `[0, max_length)`.
            visible: `[B, rows, max_length * rows]` bool, the cached tokens that
                each token sees, itself included. None, for one row: all so far.
            kernels: From `decode_kernels`, for more than one call.

        Returns:
            `[B, rows, M]`, and the cache with position `index` written.
        """
        rows = inputs.shape[1]
        length = cache["key"].shape[2] // rows
        position = tf.repeat(tf.range(length), rows)  # [T * rows]
        # Written by selection, not by a slice update: it is elementwise over any split
        # dimension, and attention reads the whole cache anyway.
        here = (position == index)[None, None, :, None]  # [1, 1, T * rows, 1]
        new = self.project_memory(inputs, kernels)  # [B, N, rows, D]
        cache = {
            name: tf.where(here, _for_each_position(new[name], length), cache[name])
            for name in new
        }
        if visible is None:
            visible = (position <= index)[None, None, :]
        visible = visible[:, None]
        attended = self._attend(inputs, cache, visible, False, "BNLD", kernels)
        return attended, cache


def _for_each_position(new: tf.Tensor, length: int) -> tf.Tensor:
    """`[B, N, rows, D]` -> `[B, N, T * rows, D]`, or to `[B, N, 1, D]` to broadcast."""
    return new if new.shape[2] == 1 else tf.tile(new, [1, 1, length, 1])


def _heads_first(x: tf.Tensor) -> tf.Tensor:
    """`[B, L, N, D]` -> `[B, N, L, D]`."""
    return annotate(tf.transpose(x, [0, 2, 1, 3]), ("batch", "heads", "length", "kv"))
