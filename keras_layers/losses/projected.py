"""Statistics of logits that never exist whole: a projection in blocks of positions.

Logits `[B, T, V]` and their gradient are often the largest tensors of a model. Here a
loop projects some positions at a time, and the gradient projects them again.
"""

from typing import Any

import tensorflow as tf

from gshard_tf import active_mesh, annotate
from gshard_tf.compat.tf_gradients import stop_recording
from keras_layers._arguments import check_int
from keras_layers._shapes import static_shape
from keras_layers.losses.statistics import (
    TokenStatistics,
    integer_labels,
    token_statistics,
)


def projected_statistics(
    labels: Any, hidden: Any, table: Any, block_length: int, transposed: bool = False
) -> TokenStatistics:
    """Returns `token_statistics` of the logits `hidden` times `table`.

    Gradients of both are exact, and computed in blocks too, at the cost of a second
    projection: a third more FLOPs of the projection than with whole logits. On a mesh
    that splits the batch or the vocabulary, no logits and no table are gathered, and
    the table's gradient is summed over devices once, not per block. The length must
    not be split. There is no second derivative.

    Args:
        labels: Whole numbers `[B, T]`.
        hidden: `[B, T, M]`. Its dtype is that of matmuls; logits are float32.
        table: `[V, M]`, such as that of `TokenEmbedding`.
        block_length: How many of the T positions are projected at a time. Memory is
            `2 * B * block_length * V` floats rather than `2 * B * T * V`. Take a
            power of two with a few thousand tokens (`B * block_length`), so that
            matmuls stay efficient. T need not be a multiple.
        transposed: Whether `table` is `[M, V]`, as that of `VocabularyProjection`.

    Raises:
        ValueError: for shapes that do not fit.
    """
    block_length = check_int("block_length", block_length, 1)
    hidden, table = tf.convert_to_tensor(hidden), tf.convert_to_tensor(table)
    labels = integer_labels(labels, hidden.shape.rank)
    if (hidden.shape.rank, labels.shape.rank, table.shape.rank) != (3, 2, 2):
        raise ValueError(
            "hidden must be [B, T, M], labels [B, T] and the table a matrix. Received: "
            f"shapes {hidden.shape}, {labels.shape} and {table.shape}"
        )
    batch, length, width = static_shape(hidden)
    count = -(-length // block_length)
    extra = count * block_length - length
    hidden = tf.pad(hidden, [[0, 0], [0, extra], [0, 0]])
    labels = tf.pad(labels, [[0, 0], [0, extra]])
    hidden = tf.reshape(hidden, [batch, count, block_length, width])
    labels = tf.reshape(labels, [batch, count, block_length])
    packed = _in_blocks(
        tf.transpose(hidden, [1, 0, 2, 3]),  # [n, B, t, M]
        tf.cast(table, hidden.dtype),
        tf.transpose(labels, [1, 0, 2]),  # [n, B, t]
        transposed,
    )  # [n, B, t, 4]
    packed = tf.reshape(tf.transpose(packed, [1, 0, 2, 3]), [batch, -1, 4])
    return unpack(packed[:, :length])


def pack(statistics: TokenStatistics) -> tf.Tensor:
    """Returns statistics as one tensor `[..., 4]`, for the output of a model."""
    return tf.stack(statistics, axis=-1)


def unpack(packed: tf.Tensor) -> TokenStatistics:
    """Returns the statistics of a tensor `[..., 4]`.

    Raises:
        ValueError: when the last dimension is another one.
    """
    if packed.shape[-1] != len(TokenStatistics._fields):
        raise ValueError(
            "Packed statistics must be [..., 4], as `pack` returns them. Received: "
            f"shape {packed.shape}"
        )
    return TokenStatistics(*tf.unstack(packed, axis=-1))


def _in_blocks(
    hidden: tf.Tensor, table: tf.Tensor, labels: tf.Tensor, transposed: bool
) -> tf.Tensor:
    """Packed statistics `[n, B, t, 4]` of `[n, B, t, M]` and `[n, B, t]`."""
    weight = "MV" if transposed else "VM"
    size = table.shape[1 if transposed else 0]

    def project(x: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
        logits = tf.einsum(f"BTM,{weight}->BTV", x, table)
        return annotate(tf.cast(logits, tf.float32), ("batch", None, "vocab"))

    @tf.custom_gradient
    def whole(hidden: tf.Tensor, table: tf.Tensor) -> tuple[tf.Tensor, Any]:
        count, batch, block, width = static_shape(hidden)

        def forward(turn, packed):
            logits = project(hidden[turn], table)  # [B, t, V]
            each = pack(token_statistics(labels[turn], logits))
            return turn + 1, packed.write(turn, each)

        with stop_recording():
            shape = [hidden.shape[1], hidden.shape[2], 4]
            arrays = tf.TensorArray(tf.float32, count, element_shape=shape)
            _, arrays = tf.while_loop(
                lambda turn, _: turn < count, forward, (tf.constant(0), arrays)
            )
            packed = arrays.stack()

        # Each device sums the table's gradient over its own rows. The sum over
        # devices follows the loop: within, it would be one of each block.
        parts = _batch_parts(hidden.shape[1])
        rows = [parts, batch // parts, block, -1]
        axes = (
            ("batch", "embed", "vocab") if transposed else ("batch", "vocab", "embed")
        )

        def gradient(d_packed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            def backward(turn, d_hidden, d_table):
                x = hidden[turn]
                chosen = tf.range(size) == labels[turn][..., None]  # [B, t, V]
                d_log_sum_exp, d_label, d_mean, _ = tf.split(d_packed[turn], 4, -1)
                softmax = tf.exp(project(x, table) - packed[turn][..., :1])
                d_logits = d_log_sum_exp * softmax + tf.where(chosen, d_label, 0.0)
                d_logits = tf.cast(d_logits + d_mean / size, table.dtype)
                d_x = tf.einsum(f"BTV,{weight}->BTM", d_logits, table)
                d_part = tf.einsum(
                    f"KBTV,KBTM->K{weight}",
                    tf.reshape(d_logits, rows),
                    tf.reshape(x, rows),
                )
                d_table = annotate(d_table + tf.cast(d_part, tf.float32), axes)
                return turn + 1, d_hidden.write(turn, d_x), d_table

            arrays = tf.TensorArray(hidden.dtype, count, element_shape=hidden.shape[1:])
            zeros = annotate(tf.zeros([parts, *table.shape]), axes)
            _, arrays, d_table = tf.while_loop(
                lambda turn, *_: turn < count,
                backward,
                (tf.constant(0), arrays, zeros),
            )
            d_table = tf.cast(tf.reduce_sum(d_table, axis=0), table.dtype)
            return _last_derivative(arrays.stack()), _last_derivative(d_table)

        return packed, gradient

    return whole(hidden, table)


def _batch_parts(batch: int | None) -> int:
    """Returns over how many devices the batch is split."""
    active = active_mesh()
    if active is None or batch is None:
        return 1
    parts = active.parts("batch")
    return parts if batch % parts == 0 else 1


@tf.custom_gradient
def _last_derivative(x: tf.Tensor) -> tuple[tf.Tensor, Any]:
    """The identity; its gradient raises instead of being wrong."""

    def gradient(_: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError(
            "projected_statistics has no second derivative: a model that needs one "
            "must compute its logits whole, and their token_statistics."
        )

    return x, gradient
