"""The sequence-to-sequence Transformer of the paper."""

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from gshard_tf import annotate
from keras_layers._arguments import check_int, check_rate
from keras_layers._seeds import child_seed
from keras_layers._segments import (
    check_segment_ids,
    real_tokens,
    segment_starts,
    token_positions,
)
from keras_layers._transformer_arguments import (
    TransformerInputs,
    check_key_dim,
    check_microbatches,
    check_moe_options,
    check_stackable,
    check_vocabularies,
    checked_inputs,
    transformer_inputs,
)
from keras_layers._transformer_blocks import build_block, make_block, make_stack
from keras_layers.dropout import Dropout
from keras_layers.embedding import TokenEmbedding, VocabularyProjection, sinusoids
from keras_layers.losses.statistics import TokenStatistics
from keras_layers.transformer_decoding import TransformerDecoding


@keras.saving.register_keras_serializable(package="gshard_tf")
class Transformer(TransformerDecoding):
    """The paper's translation model: an encoder and a decoder, half of it experts.

    Called on source and target ids, it returns logits for the next target token at each
    position. Shift the target yourself: inputs start with BOS, labels end with EOS.
    Positions with the id `pad_id` are padding; the logits carry the target's mask, so
    Keras's losses and metrics leave padding out. Positions are counted over real
    tokens, so a sequence is the same padded on the left, on the right or within.

    Args:
        source_vocab_size: Size of the source vocabulary (the paper: 64,000).
        target_vocab_size: Size of the target vocabulary, V (the paper: 32,000).
        num_encoder_layers: Encoder blocks. The paper's "12 layers" are 6 + 6.
        num_decoder_layers: Decoder blocks.
        model_dim: M (the paper: 1024).
        hidden_dim: H of feed-forward layers and of each expert (the paper: 8192).
        num_heads: N (the paper: 16).
        key_dim: D (the paper: 128). None: M / N.
        num_experts: E. 0 or None for a dense Transformer.
        moe_every: Every how many blocks the feed-forward layer is a `MoELayer`:
            2, as in the paper, makes it blocks 2, 4, ... of encoder and decoder.
        dropout: Rate on embeddings, sublayers and attention weights (the paper: 0.1).
        share_embeddings: One table for source and target, which then need one
            vocabulary.
        tie_output: Whether the target's embedding table is the output projection.
        moe_options: Further arguments of each `MoELayer`, such as
            `{"router": {"capacity_factor": 1.25}, "dispatcher": "einsum"}`.
        decoder_moe_options: The same for the decoder's; None: `moe_options`.
        pad_id: Id of padding.
        bos_id: Id that targets begin with. None: any id but `pad_id`. Required only
            for a model whose targets begin with `pad_id`, as T5's do: their first
            position is then no padding, whatever follows. Where a batch is filled up
            with rows of padding, give those a sample weight of 0.
        seed: Source of the seeds of dropout and routing, another one for each layer.
            None: the global seed. Seeds in `moe_options` are derived for each block
            likewise. (A `HashRouter`'s selects the hash, and is the same in all.)
            Initial weights are drawn from the global seed
            (`keras.utils.set_random_seed`).
        remat: Activations that are computed again for the gradient instead of being
            kept: False (none), "attention" or True (see `EncoderBlock`). Where training
            does not fit, try "attention", then True.
        stacked: Whether encoder and decoder are loops over stacked weights (`Stacked`),
            so that the time to trace and compile does not grow with depth: for deep
            models. The repeated unit is `moe_every` blocks (one without experts), and
            the numbers of layers must be multiples of it. Use it with `remat`: without,
            a copy of all weights of the blocks is kept for the gradient as well.
            `stack_weights` and `unstack_weights` convert one form to the other.
        context_parallel: How attention works where rules split `length`: "ring",
            "all_to_all" or None (see `MultiHeadAttention`).
        block_length: How many positions are projected to the vocabulary at a time
            where labels are among the inputs, so that logits never exist whole (see
            `projected_statistics` for a choice). None: all.
        microbatches: K, the parts that a batch is cut into. One after another they pass
            through encoder and decoder as pipelines (GSPMD, arXiv 2105.04663, section
            3.3; needs `stacked` and `remat=True`). The number of stages is no property
            of the model: it is that of the devices over which rules split "stage",
            and without such a rule it is 1. It must divide the units of either
            stack, and K the batch. Of the time of P stages `(P - 1) / (K + P - 1)` is
            a bubble, so take 4 P or more, as long as a microbatch fills a device.
            Where a `group_size` makes groups of more than a row, they are of tokens of
            one microbatch. Auxiliary losses are means over microbatches. Decoding
            passes through the layers one by one. None: no pipeline.

    Attributes:
        encoder_blocks: The encoder's blocks, if it is not stacked.
        decoder_blocks: The decoder's.
        encoder_stack: The encoder's `Stacked` layer, if it is stacked.
        decoder_stack: The decoder's.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        source_vocab_size: int,
        target_vocab_size: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        model_dim: int,
        hidden_dim: int,
        num_heads: int,
        key_dim: int | None = None,
        num_experts: int | None = None,
        moe_every: int = 2,
        dropout: float = 0.1,
        share_embeddings: bool = False,
        tie_output: bool = True,
        moe_options: Mapping[str, Any] | None = None,
        decoder_moe_options: Mapping[str, Any] | None = None,
        pad_id: int = 0,
        seed: int | None = None,
        remat: bool | str = False,
        stacked: bool = False,
        bos_id: int | None = None,
        context_parallel: str | None = None,
        block_length: int | None = None,
        microbatches: int | None = None,
        **kwargs: Any,
    ):
        source_vocab_size, target_vocab_size, pad_id, bos_id = check_vocabularies(
            source_vocab_size, target_vocab_size, pad_id, bos_id, share_embeddings
        )
        num_encoder_layers = check_int("num_encoder_layers", num_encoder_layers, 1)
        num_decoder_layers = check_int("num_decoder_layers", num_decoder_layers, 1)
        model_dim = check_int("model_dim", model_dim, 2)
        hidden_dim = check_int("hidden_dim", hidden_dim, 1)
        num_heads = check_int("num_heads", num_heads, 1)
        key_dim = check_key_dim(key_dim, model_dim, num_heads)
        moe_every = check_int("moe_every", moe_every, 1)
        dropout = check_rate("dropout", dropout)
        if block_length is not None:
            block_length = check_int("block_length", block_length, 1)
        if num_experts:
            num_experts = check_int("num_experts", num_experts, 2)
        check_moe_options(num_experts, moe_options, decoder_moe_options)
        if stacked:
            unit = moe_every if num_experts else 1
            check_stackable(unit, num_encoder_layers, num_decoder_layers)
        if microbatches is not None:
            microbatches = check_int("microbatches", microbatches, 1)
            check_microbatches(microbatches, stacked, remat)
        super().__init__(**kwargs)
        self.source_vocab_size = source_vocab_size
        self.target_vocab_size = target_vocab_size
        self.num_encoder_layers = num_encoder_layers
        self.num_decoder_layers = num_decoder_layers
        self.model_dim = model_dim
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.num_experts = num_experts
        self.moe_every = moe_every
        self.dropout = dropout
        self.share_embeddings = share_embeddings
        self.tie_output = tie_output
        self.moe_options = dict(moe_options or {})
        self.decoder_moe_options = (
            None if decoder_moe_options is None else dict(decoder_moe_options)
        )
        self.pad_id = pad_id
        self.bos_id = bos_id
        self.seed = seed
        self.remat = remat
        self.stacked = bool(stacked)
        self.context_parallel = context_parallel
        self.block_length = block_length
        self.microbatches = microbatches
        self._make_layers()
        self.supports_masking = True

    def _make_layers(self) -> None:
        policy = self.dtype_policy
        self.source_embedding = TokenEmbedding(
            self.source_vocab_size,
            self.model_dim,
            dtype=policy,
            name="source_embedding",
        )
        self.target_embedding = self.source_embedding
        if not self.share_embeddings:
            self.target_embedding = TokenEmbedding(
                self.target_vocab_size,
                self.model_dim,
                dtype=policy,
                name="target_embedding",
            )
        self.projection = None
        if not self.tie_output:
            self.projection = VocabularyProjection(
                self.target_vocab_size,
                self.block_length,
                dtype=policy,
                name="projection",
            )
        if self.stacked:
            self.encoder_stack = make_stack(self, "encoder", self.num_encoder_layers)
            self.decoder_stack = make_stack(self, "decoder", self.num_decoder_layers)
        else:
            self.encoder_blocks = [
                make_block(self, "encoder", i) for i in range(self.num_encoder_layers)
            ]
            self.decoder_blocks = [
                make_block(self, "decoder", i) for i in range(self.num_decoder_layers)
            ]
        self.encoder_norm = keras.layers.LayerNormalization(
            epsilon=1e-6, dtype=policy, name="encoder_norm"
        )
        self.decoder_norm = keras.layers.LayerNormalization(
            epsilon=1e-6, dtype=policy, name="decoder_norm"
        )
        self.embedding_dropout = Dropout(
            self.dropout, seed=child_seed(self.seed, "embedding"), dtype=policy
        )

    def build(self, input_shape: Any = None) -> None:
        # Lengths and batch size do not matter to any weight.
        hidden = (None, None, self.model_dim)
        self.source_embedding.build()
        if not self.share_embeddings:
            self.target_embedding.build()
        if self.stacked:
            self.encoder_stack.build(hidden)
            self.decoder_stack.build(hidden, hidden)
        else:
            for block in [*self.encoder_blocks, *self.decoder_blocks]:
                build_block(block, self.model_dim)
        self.encoder_norm.build(hidden)
        self.decoder_norm.build(hidden)
        if self.projection is not None:
            self.projection.build(hidden)
        self.built = True

    def build_from_config(self, config: dict[str, Any]) -> None:
        self.build()

    def call(
        self, inputs: Any, training: bool | None = None, decoding: bool = False
    ) -> tf.Tensor:
        """Logits `[B, T, V]` in float32, or statistics of them.

        Args:
            inputs: A pair `(source_ids [B, L], target_ids [B, T])`, or a dict with
                the keys "source" and "target". For rows that hold several sentences
                also `source_segment_ids` `[B, L]` and `target_segment_ids` `[B, T]`,
                as third and fourth or under those keys: ints, equal for a sentence and
                its translation, 0 for padding. In a dict also "labels" `[B, T]`: the
                result is then packed statistics `[B, T, 4]`, for
                `TokenCrossentropy(from_statistics=True)` and metrics alike.
            training: Whether to drop out and to route at random.
            decoding: Whether no token may be dropped, so that the logits are those
                of `decode_step`, fed one token after the other (`MoELayer.call`).
        """
        source_ids, target_ids, source_segments, segments, labels = checked_inputs(
            inputs
        )
        memory, memory_mask = self.encode(
            source_ids, training, decoding, source_segments
        )
        mask = self._target_mask(target_ids, segments)
        encoding = self._encoding(mask, segments)  # [B, T, M]
        x = self._embed(self.target_embedding, target_ids, training, encoding)
        for layer in [self.decoder_stack] if self.stacked else self.decoder_blocks:
            x = layer(
                x,
                memory,
                mask=mask,
                memory_mask=memory_mask,
                training=training,
                token_ids=target_ids,
                decoding=decoding,
                segment_ids=segments,
                memory_segment_ids=source_segments,
            )
        return self._logits(x) if labels is None else self._statistics(x, labels)

    def encode(
        self,
        source_ids: tf.Tensor,
        training: bool | None = None,
        decoding: bool = False,
        segment_ids: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the encoder's output `[B, L, M]` and its mask `[B, L]`.

        With `decoding` no token is dropped, so that the output of a sequence depends
        neither on the others nor on their padding (see `MoELayer.call`).
        `segment_ids` `[B, L]` are as in `call`.
        """
        check_segment_ids("segment_ids", segment_ids, source_ids.shape)
        mask = self._mask(source_ids, segment_ids)
        encoding = self._encoding(mask, segment_ids)  # [B, L, M]
        x = self._embed(self.source_embedding, source_ids, training, encoding)
        for layer in [self.encoder_stack] if self.stacked else self.encoder_blocks:
            x = layer(
                x,
                mask=mask,
                training=training,
                decoding=decoding,
                token_ids=source_ids,
                segment_ids=segment_ids,
            )
        return self.encoder_norm(x), mask

    @property
    def input_dtype(self) -> str:
        """The dtype of ids (see `TokenEmbedding.input_dtype`).

        So `export` has a signature of int32, whatever the policy.
        """
        return "int32"

    def _mask(self, ids: tf.Tensor, segment_ids: tf.Tensor | None) -> tf.Tensor:
        # Keras's operations, because Keras asks for the mask of symbolic inputs too.
        return real_tokens(keras.ops.not_equal(ids, self.pad_id), segment_ids)

    def _target_mask(self, ids: tf.Tensor, segment_ids: tf.Tensor | None) -> tf.Tensor:
        mask = keras.ops.not_equal(ids, self.pad_id)
        if self.bos_id == self.pad_id:
            mask = keras.ops.logical_or(mask, segment_starts(ids, segment_ids))
        return real_tokens(mask, segment_ids)

    def _encoding(self, mask: tf.Tensor, segment_ids: tf.Tensor | None) -> tf.Tensor:
        """Encoding `[B, L, M]` of each token's position among the real ones."""
        # Computed for each position once and looked up: a sine costs more than a copy.
        encoding = sinusoids(tf.range(tf.shape(mask)[1]), self.model_dim)  # [L, M]
        return tf.gather(
            tf.cast(encoding, self.compute_dtype), token_positions(mask, segment_ids)
        )

    def _embed(
        self,
        table: TokenEmbedding,
        ids: tf.Tensor,
        training: bool | None,
        encoding: tf.Tensor,
    ) -> tf.Tensor:
        x = table(ids)  # [B, L, M]
        x = x + tf.cast(encoding, x.dtype)
        x = self.embedding_dropout(x, training=training)
        return annotate(x, ("batch", "length", "embed"))

    def _logits(self, x: tf.Tensor, transposed: tf.Tensor | None = None) -> tf.Tensor:
        x = self.decoder_norm(x)
        if self.projection is None:
            return self.target_embedding.project(x, transposed)
        return self.projection(x)

    def _statistics(self, x: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        x = self.decoder_norm(x)
        if self.projection is None:
            return self.target_embedding.statistics(x, labels, self.block_length)
        return self.projection(x, labels)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> tf.Tensor:
        inputs = transformer_inputs(inputs)
        return self._target_mask(inputs.target, inputs.target_segment_ids)

    def compute_output_shape(self, input_shape: Any) -> Any:
        found = transformer_inputs(input_shape)
        return (*found.target, self._last_dimension(found))

    def compute_output_spec(
        self, inputs: Any, training: bool | None = None, decoding: bool = False
    ) -> keras.KerasTensor:
        # Not checked: on replicas Keras builds from means of their batches, all floats.
        found = transformer_inputs(inputs)
        shape = (*found.target.shape, self._last_dimension(found))
        # Float32 whatever the policy computes in.
        return keras.KerasTensor(shape, "float32")

    def _last_dimension(self, inputs: TransformerInputs) -> int:
        if inputs.labels is None:
            return self.target_vocab_size
        return len(TokenStatistics._fields)

    def get_config(self) -> dict[str, Any]:
        config = keras.layers.Layer.get_config(self)
        config.update(
            source_vocab_size=self.source_vocab_size,
            target_vocab_size=self.target_vocab_size,
            num_encoder_layers=self.num_encoder_layers,
            num_decoder_layers=self.num_decoder_layers,
            model_dim=self.model_dim,
            hidden_dim=self.hidden_dim,
            num_heads=self.num_heads,
            key_dim=self.key_dim,
            num_experts=self.num_experts,
            moe_every=self.moe_every,
            dropout=self.dropout,
            share_embeddings=self.share_embeddings,
            tie_output=self.tie_output,
            moe_options=keras.saving.serialize_keras_object(self.moe_options),
            decoder_moe_options=keras.saving.serialize_keras_object(
                self.decoder_moe_options
            ),
            pad_id=self.pad_id,
            seed=self.seed,
            remat=self.remat,
            stacked=self.stacked,
            bos_id=self.bos_id,
            context_parallel=self.context_parallel,
            block_length=self.block_length,
            microbatches=self.microbatches,
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        for name in ("moe_options", "decoder_moe_options"):
            config[name] = keras.saving.deserialize_keras_object(
                config.get(name), custom_objects=custom_objects
            )
        return cls(**config)
