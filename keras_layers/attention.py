"""Multi-head attention with named dimensions."""

from typing import Any

import keras
import tensorflow as tf

from gshard_tf import annotate, name_axes
from keras_layers._arguments import check_int
from keras_layers._padding import zero_padding
from keras_layers._segments import (
    check_both_or_none,
    check_segment_ids,
    real_tokens,
    same_segment,
)
from keras_layers._shapes import static_shape
from keras_layers.attention_decoding import (
    AttentionDecoding,
    DecodeKernels,
    KeysAndValues,
)
from keras_layers.context_parallel import (
    attend_in_ring,
    check_context_parallel,
    length_is_split,
    split_heads_instead,
)
from keras_layers.dropout import Dropout
from keras_layers.initializers import matrix_fan
from keras_layers.remat import rematerialize


@keras.saving.register_keras_serializable(package="gshard_tf")
class MultiHeadAttention(AttentionDecoding):
    """Scaled dot-product attention with N heads of size D, without biases.

    Weights are `[M, N, D]` (query, key, value) and `[N, D, M]` (output), so that a
    rule for `heads` splits all of them. Scores go through the softmax in float32.

    Args:
        num_heads: N.
        key_dim: D, of queries, keys and values. N * D need not be M: the paper has
            16 heads of 128 at M = 1024.
        dropout: Rate on the attention weights, during training.
        kernel_initializer: Of each weight, its fan counted over `M` or `N * D`.
        seed: Seed of the dropout.
        remat: Whether training keeps queries, keys and values only, and computes the
            attention weights `[B, N, T, L]` again for the gradient (as in arXiv
            2205.05198, section 5): the largest tensors of a Transformer without
            remat, for one more matmul.
        context_parallel: How `call` attends where rules split `length`. `"ring"`: keys
            and values go around the devices, and scores are never stored whole
            (`gshard_tf.ring_attention`); for the longest sequences. `"all_to_all"`:
            heads are split in place of the length, which sends less if there are
            enough heads. None: the partitioner gathers keys and values. All three
            compute the same, on any number of devices.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        seed: int | None = None,
        remat: bool = False,
        context_parallel: str | None = None,
        **kwargs: Any,
    ):
        num_heads = check_int("num_heads", num_heads, 1)
        key_dim = check_int("key_dim", key_dim, 1)
        check_context_parallel(context_parallel)
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.seed = seed
        self.remat = bool(remat)
        self.context_parallel = context_parallel
        self.dropout = Dropout(dropout, seed=seed, dtype=self.dtype_policy)
        self.supports_masking = True

    def build(self, inputs_shape: Any, memory_shape: Any = None) -> None:
        self._check_shapes(inputs_shape, memory_shape)
        model_dim = inputs_shape[-1]
        memory_dim = model_dim if memory_shape is None else memory_shape[-1]
        inner = self.num_heads * self.key_dim
        for name, rows in (
            ("query", model_dim),
            ("key", memory_dim),
            ("value", memory_dim),
        ):
            weight = self.add_weight(
                name=name,
                shape=(rows, self.num_heads, self.key_dim),
                initializer=matrix_fan(self.kernel_initializer, rows, inner, name),
            )
            name_axes(weight, ("embed", "heads", "kv"))
            setattr(self, f"{name}_kernel", weight)
        self.output_kernel = self.add_weight(
            name="output",
            shape=(self.num_heads, self.key_dim, model_dim),
            initializer=matrix_fan(self.kernel_initializer, inner, model_dim, "output"),
        )
        name_axes(self.output_kernel, ("heads", "kv", "embed"))

    def call(
        self,
        inputs: tf.Tensor,
        memory: tf.Tensor | None = None,
        mask: tf.Tensor | None = None,
        memory_mask: tf.Tensor | None = None,
        causal: bool = False,
        training: bool | None = None,
        segment_ids: tf.Tensor | None = None,
        memory_segment_ids: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Attends from `inputs` `[B, T, M]` to `memory` `[B, L, M]` or to itself.

        Args:
            inputs: Source of the queries.
            memory: Source of keys and values. None: `inputs`.
            mask: `[B, T]` bool, False for padding of `inputs`: hides keys in
                self-attention. Its values, NaN too, affect nothing.
            memory_mask: `[B, L]` bool, False for padding of `memory`; likewise.
            causal: Whether position t sees only positions up to t.
            training: Whether to drop out.
            segment_ids: `[B, T]` ints, for rows that hold several sequences: a query
                sees the keys of its own segment only. 0 is padding, as False in `mask`
                is; other numbers are arbitrary. A query whose segment has no key in
                `memory` gets 0. None: each row is one sequence.
            memory_segment_ids: `[B, L]`, the same of `memory`, and given if and only
                if there is a memory and `segment_ids` are given. (In self-attention
                keys have the segments of the queries.)

        Returns:
            `[B, T, M]`.

        Raises:
            ValueError: for inputs of other shapes, segment ids that are no integers,
                those of one side only, or `causal` with a memory.
        """
        self._check_shapes(inputs.shape, None if memory is None else memory.shape)
        if causal and memory is not None:
            raise ValueError(
                "causal must be False with memory. Received: "
                f"causal={causal}, memory of shape {memory.shape}"
            )
        self._check_segments(inputs, memory, segment_ids, memory_segment_ids)
        mask = real_tokens(mask, segment_ids)
        inputs = zero_padding(inputs, mask)
        if memory is None:
            memory, memory_mask, memory_segment_ids = inputs, mask, segment_ids
        else:
            memory_mask = real_tokens(memory_mask, memory_segment_ids)
            memory = zero_padding(memory, memory_mask)
        segments, visible = None, None
        if segment_ids is not None:
            # Padding of either kind is in segment 0, so that there is no other mask.
            keys = tf.where(tf.cast(memory_mask, tf.bool), memory_segment_ids, 0)
            segments = (segment_ids, keys)
        elif memory_mask is not None:
            visible = tf.cast(memory_mask, tf.bool)[:, None, None, :]  # [B, 1, 1, L]
        outputs = self._attend(
            inputs,
            self.project(memory),
            visible,
            training,
            segments=segments,
            causal=causal,
        )
        if segments is not None and memory is not inputs:
            # Where no key is visible, the softmax is even over all other segments. (In
            # self-attention a token sees itself.)
            sees = tf.reduce_any(same_segment(*segments), axis=-1)[:, 0]  # [B, T]
            outputs = zero_padding(outputs, sees)
        return outputs

    @staticmethod
    def _check_segments(
        inputs: tf.Tensor,
        memory: tf.Tensor | None,
        segment_ids: tf.Tensor | None,
        memory_segment_ids: tf.Tensor | None,
    ) -> None:
        check_segment_ids("segment_ids", segment_ids, inputs.shape[:2])
        if memory is not None:
            check_both_or_none(
                ("segment_ids", segment_ids), ("memory_segment_ids", memory_segment_ids)
            )
            check_segment_ids(
                "memory_segment_ids", memory_segment_ids, memory.shape[:2]
            )
        elif memory_segment_ids is not None:
            raise ValueError(
                "memory_segment_ids must be None without memory: keys have the "
                "segment_ids of the queries. Received: memory_segment_ids of shape "
                f"{tuple(memory_segment_ids.shape)}"
            )

    @staticmethod
    def _check_shapes(inputs_shape: Any, memory_shape: Any) -> None:
        shapes = [s for s in (inputs_shape, memory_shape) if s is not None]
        if any(len(shape) != 3 or shape[-1] is None for shape in shapes):
            raise ValueError(
                "Inputs and memory of attention must be [batch, length, "
                "width], of known width. Reshape others, such as images to "
                "[batch, height * width, channels]. "
                f"Received: shapes {[tuple(shape) for shape in shapes]}"
            )

    def project(
        self, memory: tf.Tensor, kernels: DecodeKernels | None = None
    ) -> KeysAndValues:
        """Keys and values `[B, L, N, D]` of `memory` `[B, L, M]`."""
        memory = tf.cast(memory, self.compute_dtype)
        return {
            name: self._to_heads(name, memory, kernels) for name in ("key", "value")
        }

    def _attend(
        self,
        inputs: tf.Tensor,
        projected: KeysAndValues,
        visible: tf.Tensor | None,
        training: bool | None,
        dims: str = "BLND",
        kernels: DecodeKernels | None = None,
        segments: tuple[tf.Tensor, tf.Tensor] | None = None,
        causal: bool = False,
    ) -> tf.Tensor:
        """Attends with the scores in `projected`, of dimensions `dims`.

        `segments` are ids of queries `[B, T]` and of keys `[B, L]`.
        """
        inputs = tf.cast(inputs, self.compute_dtype)
        query = self._to_heads("query", inputs, kernels)  # [B, T, N, D]
        query = query * tf.cast(self.key_dim**-0.5, query.dtype)

        def weighted_values(query, key, value, visible, *segments):
            if segments:
                same = same_segment(*segments)  # [B, 1, T, L]
                visible = same if visible is None else tf.logical_and(visible, same)
            if causal:
                position = tf.range(tf.shape(query)[1])
                past = position[None, :] <= position[:, None]  # [T, L]
                visible = past if visible is None else tf.logical_and(visible, past)
            scores = tf.einsum(f"BTND,{dims}->BNTL", query, key)
            scores = tf.cast(scores, tf.float32)
            if visible is not None:
                # Finite, so that a row without any visible position gives no NaN.
                scores = tf.where(visible, scores, -1e30)
            weights = tf.cast(tf.nn.softmax(scores, axis=-1), query.dtype)
            weights = self.dropout(weights, training=training)
            return tf.einsum(f"BNTL,{dims}->BTND", weights, value)

        # Segments, not their mask of all pairs, are what remat keeps.
        key, value = projected["key"], projected["value"]
        split = dims == "BLND" and length_is_split(query, key, value)
        if split and self.context_parallel == "all_to_all":
            query, key, value = split_heads_instead(query, key, value)
        tensors = (query, key, value, visible, *(segments or ()))
        if split and self.context_parallel == "ring":
            heads = attend_in_ring(
                self.dropout, query, key, value, visible, segments, causal, training
            )
        elif self.remat and training:
            heads = rematerialize(self.dropout, weighted_values, *tensors)
        else:
            heads = weighted_values(*tensors)
        if split and self.context_parallel == "all_to_all":
            [heads] = split_heads_instead(heads)  # and so the gradient of it
        heads = annotate(heads, ("batch", "length", "heads", "kv"))
        if kernels is None:
            outputs = tf.einsum("BTND,NDM->BTM", heads, self._weight("output"))
        else:
            batch, length, count, size = static_shape(heads)
            heads = tf.reshape(heads, [batch, length, count * size])
            outputs = tf.einsum("BTF,FM->BTM", heads, kernels["output"])
        return annotate(outputs, ("batch", "length", "embed"))

    def _to_heads(
        self, name: str, x: tf.Tensor, kernels: DecodeKernels | None
    ) -> tf.Tensor:
        """`[B, L, M]` -> `[B, L, N, D]`: the queries, keys or values of `x`."""
        if kernels is None:
            heads = tf.einsum("BLM,MND->BLND", x, self._weight(name))
        else:
            batch, length, _ = static_shape(x)
            heads = tf.einsum("BLM,MF->BLF", x, kernels[name])
            heads = tf.reshape(heads, [batch, length, self.num_heads, self.key_dim])
        return annotate(heads, ("batch", "length", "heads", "kv"))

    def _weight(self, name: str) -> tf.Tensor:
        # Keras casts weights by itself within `__call__` only; decoding calls the
        # other methods directly.
        return tf.cast(getattr(self, f"{name}_kernel"), self.compute_dtype)

    def compute_output_shape(self, inputs_shape: Any, memory_shape: Any = None) -> Any:
        return inputs_shape

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return previous_mask

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            num_heads=self.num_heads,
            key_dim=self.key_dim,
            dropout=self.dropout.rate,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
            seed=self.seed,
            remat=self.remat,
            context_parallel=self.context_parallel,
        )
        return config
