"""The blocks of encoder and decoder: attention, then feed-forward or experts."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from gshard_tf import annotate
from keras_layers._arguments import check_choice, check_int, check_rate
from keras_layers._padding import zero_padding
from keras_layers._seeds import child_seed
from keras_layers._segments import check_both_or_none, real_tokens
from keras_layers._shapes import static_shape
from keras_layers.attention import MultiHeadAttention
from keras_layers.dropout import Dropout
from keras_layers.feed_forward import FeedForward
from keras_layers.moe.layer import MoELayer
from keras_layers.moe.options import block_moe_options
from keras_layers.remat import rematerialize

REMAT = (False, "attention", True)


class _Block(keras.layers.Layer):
    """Base of encoder and decoder blocks: pre-norm sublayers with residuals.

    Args:
        num_heads: N.
        key_dim: D.
        hidden_dim: H of the feed-forward layer, or of each expert.
        num_experts: E of a `MoELayer` in place of the feed-forward layer; 0 or None
            for a dense one.
        dropout: Rate on attention weights, on the hidden layer of a dense
            feed-forward, and on each sublayer's output before the residual.
        moe_options: Further arguments of `MoELayer`.
        seed: Source of the seeds of the block's layers, one for each. None: the global
            seed. Two blocks of one seed draw the same numbers.
        remat: Activations that training computes again for the gradient instead of
            keeping them. False: none. "attention": the attention weights, the largest
            tensors of a long sequence, for a few percent more computation. True: all
            but the block's inputs, so memory of one block instead of all, for about a
            third more computation and, with experts, the forward pass's all-to-alls
            once more.
        context_parallel: How attention works where rules split `length`: "ring",
            "all_to_all" or None (see `MultiHeadAttention`).
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        hidden_dim: int,
        num_experts: int | None = None,
        dropout: float = 0.1,
        moe_options: Mapping[str, Any] | None = None,
        seed: int | None = None,
        remat: bool | str = False,
        context_parallel: str | None = None,
        **kwargs: Any,
    ):
        num_heads = check_int("num_heads", num_heads, 1)
        key_dim = check_int("key_dim", key_dim, 1)
        hidden_dim = check_int("hidden_dim", hidden_dim, 1)
        if num_experts:
            num_experts = check_int("num_experts", num_experts, 2)
        dropout = check_rate("dropout", dropout)
        check_choice("remat", remat, REMAT)
        if moe_options and not num_experts:
            raise ValueError(
                "moe_options must be empty for a block without experts. Received: "
                f"moe_options={dict(moe_options)} and num_experts={num_experts}"
            )
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.hidden_dim = hidden_dim
        self.num_experts = num_experts
        self.dropout = dropout
        self.moe_options = dict(moe_options or {})
        self.seed = seed
        self.remat = remat
        self.context_parallel = context_parallel
        self.self_attention = self._attention("self_attention")
        if num_experts:
            options = {
                "seed": child_seed(seed, "feed_forward"),
                "name": f"{self.name}_moe",
                **block_moe_options(self.moe_options, seed),
            }
            self.feed_forward = MoELayer(
                num_experts, hidden_dim, dtype=self.dtype_policy, **options
            )
        else:
            self.feed_forward = FeedForward(
                hidden_dim,
                dropout=dropout,
                seed=child_seed(seed, "feed_forward"),
                dtype=self.dtype_policy,
                name="feed_forward",
            )
        self.attention_norm = self._norm("attention_norm")
        self.feed_forward_norm = self._norm("feed_forward_norm")
        self.residual_dropout = Dropout(
            dropout, seed=child_seed(seed, "residual"), dtype=self.dtype_policy
        )
        self.supports_masking = True

    def _attention(self, name: str) -> MultiHeadAttention:
        return MultiHeadAttention(
            self.num_heads,
            self.key_dim,
            dropout=self.dropout,
            seed=child_seed(self.seed, name),
            remat=self.remat == "attention",
            context_parallel=self.context_parallel,
            dtype=self.dtype_policy,
            name=name,
        )

    def _norm(self, name: str) -> keras.layers.Layer:
        return keras.layers.LayerNormalization(
            epsilon=1e-6, dtype=self.dtype_policy, name=name
        )

    def _apply_feed_forward(
        self,
        x: tf.Tensor,
        mask: tf.Tensor | None,
        training: bool | None,
        decoding: bool = False,
        token_ids: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """The feed-forward sublayer with its residual: `[B, L, M]`."""
        normed = self.feed_forward_norm(x)
        if self.num_experts:
            fed = self.feed_forward(
                normed,
                mask=mask,
                training=training,
                decoding=decoding,
                token_ids=token_ids,
            )
        else:
            fed = self.feed_forward(normed, training=training)
        return self._residual(x, fed, training)

    def _run(
        self, block: Callable[..., tf.Tensor], training: bool | None, *tensors: Any
    ) -> tf.Tensor:
        if self.remat is True and training:
            return rematerialize(self, block, *tensors)
        return block(*tensors)

    def _residual(
        self, x: tf.Tensor, update: tf.Tensor, training: bool | None
    ) -> tf.Tensor:
        x = x + self.residual_dropout(update, training=training)
        return annotate(x, ("batch", "length", "embed"))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            num_heads=self.num_heads,
            key_dim=self.key_dim,
            hidden_dim=self.hidden_dim,
            num_experts=self.num_experts,
            dropout=self.dropout,
            moe_options=keras.saving.serialize_keras_object(self.moe_options),
            seed=self.seed,
            remat=self.remat,
            context_parallel=self.context_parallel,
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "_Block":
        config = dict(config)
        config["moe_options"] = keras.saving.deserialize_keras_object(
            config.get("moe_options")
        )
        return cls(**config)


def _with_arguments(summary: str) -> str:
    """Docstring of a block: its summary, and the arguments of all blocks."""
    return summary + "\n" + (_Block.__doc__ or "").partition("\n")[2]


@keras.saving.register_keras_serializable(package="gshard_tf")
class EncoderBlock(_Block):
    __doc__ = _with_arguments(
        "Self-attention, then a feed-forward or mixture-of-experts layer."
    )

    def build(self, input_shape: Any) -> None:
        shape = (None, None, input_shape[-1])
        self.attention_norm.build(shape)
        self.self_attention.build(shape)
        self.feed_forward_norm.build(shape)
        self.feed_forward.build(shape)

    def call(
        self,
        inputs: tf.Tensor,
        mask: tf.Tensor | None = None,
        training: bool | None = None,
        decoding: bool = False,
        token_ids: tf.Tensor | None = None,
        segment_ids: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """`inputs` `[B, L, M]` -> the same.

        Args:
            inputs: The tokens.
            mask: `[B, L]` bool, False for padding.
            training: Whether to drop out.
            decoding: For the experts (see `MoELayer.call`).
            token_ids: `[B, L]`, for the experts too.
            segment_ids: `[B, L]` ints, the sequence of its row that a token belongs
                to; 0 for padding (see `MultiHeadAttention.call`).
        """

        def block(inputs, mask, token_ids, segment_ids):
            mask = real_tokens(mask, segment_ids)
            inputs = zero_padding(inputs, mask)
            attended = self.self_attention(
                self.attention_norm(inputs),
                mask=mask,
                training=training,
                segment_ids=segment_ids,
            )
            x = self._residual(inputs, attended, training)
            return self._apply_feed_forward(x, mask, training, decoding, token_ids)

        return self._run(block, training, inputs, mask, token_ids, segment_ids)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


@keras.saving.register_keras_serializable(package="gshard_tf")
class DecoderBlock(_Block):
    __doc__ = _with_arguments(
        "Causal self-attention, attention to the encoder, then feed-forward or MoE."
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        router = self.feed_forward.router if self.num_experts else None
        causal = getattr(router, "is_causal", True)
        if not causal and not getattr(router, "allow_causal", False):
            raise ValueError(
                "In a causal decoder a token's experts must not depend on the tokens "
                "after it: training would see the future, and generation would route "
                "otherwise. Give the decoder another router (decoder_moe_options of "
                "Transformer), or set allow_causal=True on one that has it. "
                f"Received: router={router!r}"
            )
        self.cross_attention = self._attention("cross_attention")
        self.cross_norm = self._norm("cross_norm")

    def build(self, inputs_shape: Any, memory_shape: Any) -> None:
        shape = (None, None, inputs_shape[-1])
        memory = (None, None, memory_shape[-1])
        self.attention_norm.build(shape)
        self.self_attention.build(shape)
        self.cross_norm.build(shape)
        self.cross_attention.build(shape, memory)
        self.feed_forward_norm.build(shape)
        self.feed_forward.build(shape)

    def call(
        self,
        inputs: tf.Tensor,
        memory: tf.Tensor,
        mask: tf.Tensor | None = None,
        memory_mask: tf.Tensor | None = None,
        training: bool | None = None,
        token_ids: tf.Tensor | None = None,
        decoding: bool = False,
        segment_ids: tf.Tensor | None = None,
        memory_segment_ids: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """`inputs` `[B, T, M]` attends to `memory` `[B, L, M]`, the encoder's output.

        Args:
            inputs: Target side.
            memory: Source side.
            mask: `[B, T]` bool, False for padding.
            memory_mask: `[B, L]` bool, False for padding.
            training: Whether to drop out.
            token_ids: `[B, T]`, for the experts (see `MoELayer.call`).
            decoding: For the experts too.
            segment_ids: `[B, T]` ints, the sequence of its row that a token belongs to;
                0 for padding (see `MultiHeadAttention.call`).
            memory_segment_ids: `[B, L]`, the same of `memory`. Both or none.
        """
        check_both_or_none(
            ("segment_ids", segment_ids), ("memory_segment_ids", memory_segment_ids)
        )

        def block(
            inputs,
            memory,
            mask,
            memory_mask,
            token_ids,
            segment_ids,
            memory_segment_ids,
        ):
            mask = real_tokens(mask, segment_ids)
            inputs = zero_padding(inputs, mask)
            attended = self.self_attention(
                self.attention_norm(inputs),
                mask=mask,
                causal=True,
                training=training,
                segment_ids=segment_ids,
            )
            x = self._residual(inputs, attended, training)
            attended = self.cross_attention(
                self.cross_norm(x),
                memory,
                memory_mask=memory_mask,
                training=training,
                segment_ids=segment_ids,
                memory_segment_ids=memory_segment_ids,
            )
            x = self._residual(x, attended, training)
            return self._apply_feed_forward(x, mask, training, decoding, token_ids)

        segments = (segment_ids, memory_segment_ids)
        return self._run(
            block, training, inputs, memory, mask, memory_mask, token_ids, *segments
        )

    def init_cache(
        self, memory: tf.Tensor, max_length: int, hypotheses: int = 1, flat: bool = True
    ) -> dict[str, Any]:
        """Returns an empty cache of positions, and the memory's keys and values.

        Args:
            memory: `[B, L, M]`.
            max_length: Positions.
            hypotheses: K, sequences that grow from each row of `memory`.
            flat: Whether the hypotheses of a row share one cache (see `decode`), or
                each has its own.
        """
        batch = static_shape(memory)[0]
        rows, batch = (hypotheses, batch) if flat else (1, batch * hypotheses)
        return {
            "self": self.self_attention.init_cache(batch, max_length, rows),
            "cross": self.cross_attention.project_memory(memory),
        }

    def decode_kernels(self) -> dict[str, Any]:
        """Attention's weights for a loop of `decode`."""
        return {
            "self": self.self_attention.decode_kernels(),
            "cross": self.cross_attention.decode_kernels(("query", "output")),
        }

    def decode(
        self,
        inputs: tf.Tensor,
        cache: dict[str, Any],
        index: int | tf.Tensor,
        memory_mask: tf.Tensor | None = None,
        token_ids: tf.Tensor | None = None,
        visible: tf.Tensor | None = None,
        kernels: dict[str, Any] | None = None,
    ) -> tuple[tf.Tensor, dict[str, Any]]:
        """Runs one position: `inputs` `[B, K, M]` -> `[B, K, M]` and the updated cache.

        The K hypotheses of a row are positions to the attention to the encoder, whose
        keys and values they share.

        Args:
            inputs: `[B, K, M]`.
            cache: From `init_cache`, or the step before.
            index: Int or scalar int32 tensor.
            memory_mask: `[B, L]` bool, False for padding.
            token_ids: `[B, K]`, for the experts.
            visible: See `MultiHeadAttention.decode`; for a shared cache.
            kernels: From `decode_kernels`, for more than one position.
        """
        normed = self.attention_norm(inputs)
        shape, kernels = static_shape(inputs), kernels or {}
        # Without a shared cache each hypothesis is a row of its own.
        rows = 1 if visible is None else shape[1]
        attended, own = self.self_attention.decode(
            tf.reshape(normed, [-1, rows, shape[-1]]),
            cache["self"],
            index,
            visible,
            kernels.get("self"),
        )
        x = inputs + tf.reshape(attended, shape)
        x = x + self.cross_attention.cross_attend(
            self.cross_norm(x), cache["cross"], memory_mask, kernels.get("cross")
        )
        x = self._apply_feed_forward(
            x, None, training=False, decoding=True, token_ids=token_ids
        )
        return x, {**cache, "self": own}

    def compute_output_shape(self, inputs_shape: Any, memory_shape: Any = None) -> Any:
        return inputs_shape

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return previous_mask
