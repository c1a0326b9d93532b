"""Token embeddings, positions, and the projection to the vocabulary."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gshard_tf import annotate, name_axes
from keras_layers._arguments import check_int
from keras_layers._shapes import at_each_position, check_positions, position_axes
from keras_layers.losses.projected import pack, projected_statistics
from keras_layers.losses.statistics import TokenStatistics, token_statistics


@keras.saving.register_keras_serializable(package="gshard_tf")
class TokenEmbedding(keras.layers.Layer):
    """A table `[V, M]` that embeds tokens and can serve as the output projection.

    Embeddings are scaled by the square root of M, as in the Transformer: the table
    itself has the scale that suits the projection.

    Args:
        vocab_size: V.
        model_dim: M.
    """

    def __init__(self, vocab_size: int, model_dim: int, **kwargs: Any):
        vocab_size = check_int("vocab_size", vocab_size, 1)
        model_dim = check_int("model_dim", model_dim, 1)
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.model_dim = model_dim
        self.supports_masking = True

    def build(self, input_shape: Any = None) -> None:
        self.table = self.add_weight(
            name="table",
            shape=(self.vocab_size, self.model_dim),
            initializer=keras.initializers.RandomNormal(stddev=self.model_dim**-0.5),
        )
        name_axes(self.table, ("vocab", "embed"))

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Ids `[B]`, `[B, L]` or of any other shape -> `[..., M]`."""
        if inputs.dtype not in (tf.int32, tf.int64):
            # Corpora are kept in small types.
            inputs = tf.cast(inputs, tf.int32)
        table = tf.cast(self.table, self.compute_dtype)
        embedded = _dense_lookup(table, inputs) * tf.cast(
            self.model_dim**0.5, table.dtype
        )
        return annotate(embedded, (*position_axes(len(embedded.shape)), "embed"))

    @property
    def input_dtype(self) -> str:
        """The dtype of ids, also where Keras would make them floats.

        It does when it builds a model under a strategy of several replicas (the mean of
        their ids) and in the signature of an exported model. A low precision would
        round ids.
        """
        return "int32"

    def project(
        self, inputs: tf.Tensor, transposed: tf.Tensor | None = None
    ) -> tf.Tensor:
        """`[B, L, M]` -> logits `[B, L, V]` in float32.

        Args:
            inputs: Outputs of the decoder.
            transposed: From `transposed_table`, for more than one call.
        """
        if transposed is None:
            table = tf.cast(self.table, self.compute_dtype)
            logits = tf.einsum("BLM,VM->BLV", tf.cast(inputs, table.dtype), table)
        else:
            inputs = tf.cast(inputs, transposed.dtype)
            logits = tf.einsum("BLM,MV->BLV", inputs, transposed)
        return annotate(tf.cast(logits, tf.float32), ("batch", "length", "vocab"))

    def statistics(
        self, inputs: tf.Tensor, labels: tf.Tensor, block_length: int | None = None
    ) -> tf.Tensor:
        """`[B, L, M]` -> packed statistics `[B, L, 4]` of what `project` returns.

        Args:
            inputs: Outputs of the decoder.
            labels: `[B, L]`.
            block_length: How many positions are projected at a time (see
                `projected_statistics`). None: all.
        """
        if block_length is None:
            return pack(token_statistics(labels, self.project(inputs)))
        inputs = tf.cast(inputs, self.compute_dtype)
        table = tf.convert_to_tensor(self.table)
        return pack(projected_statistics(labels, inputs, table, block_length))

    def transposed_table(self) -> tf.Tensor:
        """`[M, V]`, for many projections of few tokens.

        On CPUs a matmul of 4 to 64 rows with it is 1.5 to 10 times as fast as with the
        table, which is packed again for each matmul.
        """
        transposed = tf.transpose(tf.cast(self.table, self.compute_dtype))
        return annotate(transposed, ("embed", "vocab"))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape, self.model_dim)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(vocab_size=self.vocab_size, model_dim=self.model_dim)
        return config


@keras.saving.register_keras_serializable(package="gshard_tf")
class VocabularyProjection(keras.layers.Layer):
    """A matrix `[M, V]` to the vocabulary, where it is not the embedding table.

    Args:
        vocab_size: V.
        block_length: How many positions are projected at a time where labels are
            given (see `projected_statistics`). None: all.
    """

    def __init__(self, vocab_size: int, block_length: int | None = None, **kwargs: Any):
        vocab_size = check_int("vocab_size", vocab_size, 1)
        if block_length is not None:
            block_length = check_int("block_length", block_length, 1)
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.block_length = block_length
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        check_positions(self, input_shape, 2, "[..., width]")
        self.kernel = self.add_weight(
            name="kernel",
            shape=(input_shape[-1], self.vocab_size),
            initializer="lecun_normal",
        )
        name_axes(self.kernel, ("embed", "vocab"))

    def call(self, inputs: tf.Tensor, labels: tf.Tensor | None = None) -> tf.Tensor:
        """`[..., M]` -> logits `[..., V]` in float32, or statistics of them.

        Args:
            inputs: `[..., M]`; `[B, T, M]` for blocks.
            labels: `[...]`. With them the result is packed statistics `[..., 4]`, for
                `TokenCrossentropy(from_statistics=True)` and metrics alike.
        """
        inputs = tf.cast(inputs, self.compute_dtype)
        if labels is not None and self.block_length is not None:
            kernel = tf.convert_to_tensor(self.kernel)
            return pack(
                projected_statistics(labels, inputs, kernel, self.block_length, True)
            )
        logits = at_each_position(inputs, self.kernel)
        names = position_axes(len(logits.shape))
        logits = annotate(tf.cast(logits, tf.float32), (*names, "vocab"))
        return logits if labels is None else pack(token_statistics(labels, logits))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape[:-1], self.vocab_size)

    def compute_output_spec(self, inputs: Any, labels: Any = None) -> keras.KerasTensor:
        last = self.vocab_size if labels is None else len(TokenStatistics._fields)
        return keras.KerasTensor((*inputs.shape[:-1], last), "float32")

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(vocab_size=self.vocab_size, block_length=self.block_length)
        return config


def sinusoids(
    positions: tf.Tensor, model_dim: int, max_timescale: float = 1e4
) -> tf.Tensor:
    """Sinusoidal encodings of positions `[L]`: float32 `[L, M]`.

    Sines in the first half and cosines in the second, wavelengths growing from
    2 pi to `max_timescale` * 2 pi. Computed, not looked up, so there is no maximal
    length; an odd width ends with a 0.
    """
    half = model_dim // 2
    exponent = np.arange(half, dtype=np.float32) / max(half - 1, 1)
    angle = tf.cast(positions, tf.float32)[:, None] * max_timescale**-exponent
    encoding = tf.concat([tf.sin(angle), tf.cos(angle)], axis=-1)
    return tf.pad(encoding, [[0, 0], [0, model_dim - 2 * half]])


@tf.custom_gradient
def _dense_lookup(table: tf.Tensor, ids: tf.Tensor) -> tuple[tf.Tensor, Any]:
    """Rows of `table` with a dense gradient.

    `tf.gather` alone gives `IndexedSlices`. Optimizers that keep a slot per weight
    need the dense sum anyway, as does a table that is also the output projection.
    """
    rows = tf.gather(table, ids)

    def gradient(d_rows: tf.Tensor) -> tuple[tf.Tensor, None]:
        flat = tf.reshape(d_rows, [-1, table.shape[-1]])
        sums = tf.math.unsorted_segment_sum(
            tf.cast(flat, tf.float32), tf.reshape(ids, [-1]), table.shape[0]
        )
        return tf.cast(sums, table.dtype), None

    return rows, gradient
