"""The sequence-to-sequence Transformer of the paper."""

from collections.abc import Iterable, Mapping
from typing import Any

import keras
import tensorflow as tf

from gshard_tf import annotate
from keras_layers._arguments import check_int, check_rate, check_token_id
from keras_layers._padding import places
from keras_layers._seeds import child_seed
from keras_layers._shapes import sizes
from keras_layers.blocks import DecoderBlock, EncoderBlock
from keras_layers.dropout import Dropout
from keras_layers.embedding import TokenEmbedding, VocabularyProjection, sinusoids
from keras_layers.moe.options import moe_options_of
from keras_layers.stacked import Stacked

DecodingState = dict[str, Any]


@keras.saving.register_keras_serializable(package="gshard_tf")
class Transformer(keras.Model):
    """The paper's translation model: an encoder and a decoder, half of it experts.

    Called on source and target ids, it gives logits for the next target token at each
    position. Shift the target yourself: inputs start with BOS, labels end with EOS.
    Padding is wherever an id is `pad_id`; the logits carry the target's mask, so
    Keras's losses and metrics leave padding out. Positions are counted over what is no
    padding, so a sequence is the same padded on the left, on the right or within.

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
        bos_id: Id that targets begin with. None: whatever it is, it is not `pad_id`.
            Only a model whose targets begin with `pad_id`, as T5's do, has to say it:
            their first position is then no padding, whatever follows. Where a batch is
            filled up with rows of padding, give those a sample weight of 0.
        seed: What the seeds of dropout and routing follow from, another one for each
            layer. None: from the global seed. So do seeds in `moe_options`, for each
            block. (A `HashRouter`'s says which hash, and is the same in all.) Initial
            weights are drawn from the global seed (`keras.utils.set_random_seed`).
        remat: What is computed again for the gradient instead of being kept for it:
            False (nothing), "attention" or True (see `EncoderBlock`). Where training
            does not fit, try "attention", then True.
        stacked: Whether encoder and decoder are loops over stacked weights (`Stacked`),
            so that the time to trace and compile does not grow with depth: for deep
            models. What is repeated are `moe_every` blocks (one without experts), which
            the numbers of layers must be multiples of. Use `remat` with it: without, a
            copy of all weights of the blocks is kept for the gradient as well.
            `stack_weights` and `unstack_weights` go from one form to the other.

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
        **kwargs: Any,
    ):
        source_vocab_size = check_int("source_vocab_size", source_vocab_size, 1)
        target_vocab_size = check_int("target_vocab_size", target_vocab_size, 1)
        num_encoder_layers = check_int("num_encoder_layers", num_encoder_layers, 1)
        num_decoder_layers = check_int("num_decoder_layers", num_decoder_layers, 1)
        model_dim = check_int("model_dim", model_dim, 2)
        hidden_dim = check_int("hidden_dim", hidden_dim, 1)
        num_heads = check_int("num_heads", num_heads, 1)
        moe_every = check_int("moe_every", moe_every, 1)
        smaller = min(source_vocab_size, target_vocab_size)
        pad_id = check_token_id("pad_id", pad_id, smaller)
        if bos_id is not None:
            bos_id = check_token_id("bos_id", bos_id, target_vocab_size)
        dropout = check_rate("dropout", dropout)
        if num_experts:
            num_experts = check_int("num_experts", num_experts, 2)
        elif moe_options or decoder_moe_options:
            raise ValueError(
                "moe_options are for a model with experts. Received: "
                f"moe_options={moe_options}, decoder_moe_options={decoder_moe_options} "
                f"and num_experts={num_experts}"
            )
        if share_embeddings and source_vocab_size != target_vocab_size:
            raise ValueError(
                "share_embeddings needs vocabularies of one size. Received: "
                f"source_vocab_size={source_vocab_size}, "
                f"target_vocab_size={target_vocab_size}"
            )
        unit = moe_every if num_experts else 1
        if stacked and (num_encoder_layers % unit or num_decoder_layers % unit):
            raise ValueError(
                f"A stacked model repeats units of moe_every={moe_every} blocks, so "
                "its numbers of layers must be multiples of that. Received: "
                f"num_encoder_layers={num_encoder_layers}, "
                f"num_decoder_layers={num_decoder_layers}"
            )
        if key_dim is None:
            if model_dim % num_heads:
                raise ValueError(
                    "Without key_dim, model_dim must be a multiple of num_heads. "
                    f"Received: model_dim={model_dim}, num_heads={num_heads}"
                )
            key_dim = model_dim // num_heads
        key_dim = check_int("key_dim", key_dim, 1)
        for options in (moe_options or {}, decoder_moe_options or {}):
            if taken := set(options) & {"name", "num_experts", "hidden_dim"}:
                raise ValueError(
                    "moe_options are what the model does not set itself. "
                    f"Received: {sorted(taken)}"
                )
            if isinstance(options.get("router"), keras.layers.Layer):
                raise ValueError(
                    "One router layer would be shared by all blocks. Give its "
                    'arguments, such as {"kind": "top_k", "k": 1}. '
                    f"Received: router={options['router']!r}"
                )
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

        policy = self.dtype_policy
        self.source_embedding = TokenEmbedding(
            source_vocab_size, model_dim, dtype=policy, name="source_embedding"
        )
        self.target_embedding = self.source_embedding
        if not share_embeddings:
            self.target_embedding = TokenEmbedding(
                target_vocab_size, model_dim, dtype=policy, name="target_embedding"
            )
        self.projection = None
        if not tie_output:
            self.projection = VocabularyProjection(
                target_vocab_size, dtype=policy, name="projection"
            )
        if stacked:
            self.encoder_stack = self._stack("encoder", num_encoder_layers // unit)
            self.decoder_stack = self._stack("decoder", num_decoder_layers // unit)
        else:
            self.encoder_blocks = [
                EncoderBlock(**self._block_arguments("encoder", i))
                for i in range(1, num_encoder_layers + 1)
            ]
            self.decoder_blocks = [
                DecoderBlock(**self._block_arguments("decoder", i))
                for i in range(1, num_decoder_layers + 1)
            ]
        self.encoder_norm = keras.layers.LayerNormalization(
            epsilon=1e-6, dtype=policy, name="encoder_norm"
        )
        self.decoder_norm = keras.layers.LayerNormalization(
            epsilon=1e-6, dtype=policy, name="decoder_norm"
        )
        self.embedding_dropout = Dropout(
            dropout, seed=child_seed(seed, "embedding"), dtype=policy
        )
        self.supports_masking = True

    def _block_arguments(self, side: str, number: int) -> dict[str, Any]:
        """Arguments of block `number`, counted from 1."""
        has_experts = bool(self.num_experts) and number % self.moe_every == 0
        options = self.moe_options
        if side == "decoder" and self.decoder_moe_options is not None:
            options = self.decoder_moe_options
        return {
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "hidden_dim": self.hidden_dim,
            "num_experts": self.num_experts if has_experts else None,
            "dropout": self.dropout,
            "moe_options": (
                moe_options_of(options, self.seed, side, number)
                if has_experts
                else None
            ),
            "seed": child_seed(self.seed, side, number),
            # A stack computes whole repetitions again by itself.
            "remat": False if self.stacked and self.remat is True else self.remat,
            "dtype": self.dtype_policy,
            "name": f"{side}_{number}",
        }

    def _stack(self, side: str, count: int) -> Stacked:
        unit = self.moe_every if self.num_experts else 1
        hidden = (None, None, self.model_dim)

        def make_blocks(repetition: int) -> list[EncoderBlock | DecoderBlock]:
            made = []
            for i in range(1, unit + 1):
                arguments = self._block_arguments(side, repetition * unit + i)
                if side == "encoder":
                    made.append(EncoderBlock(**arguments))
                    made[-1].build(hidden)
                else:
                    made.append(DecoderBlock(**arguments))
                    made[-1].build(hidden, hidden)
            return made

        return Stacked(
            make_blocks, count, self.remat is True, dtype=self.dtype_policy, name=side
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
            for block in self.encoder_blocks:
                block.build(hidden)
            for block in self.decoder_blocks:
                block.build(hidden, hidden)
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
        """Logits `[B, T, V]` in float32.

        Args:
            inputs: A pair `(source_ids [B, L], target_ids [B, T])`, or a dict with
                the keys "source" and "target".
            training: Whether to drop out and to route at random.
            decoding: Whether no token may be dropped, so that the logits are those
                of `decode_step`, fed one token after the other (`MoELayer.call`).
        """
        source_ids, target_ids = _source_and_target(inputs)
        memory, memory_mask = self.encode(source_ids, training, decoding)
        mask = self._target_mask(target_ids)
        encoding = self._encoding(mask)  # [B, T, M]
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
            )
        return self._logits(x)

    def encode(
        self,
        source_ids: tf.Tensor,
        training: bool | None = None,
        decoding: bool = False,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The encoder's output `[B, L, M]` and its mask `[B, L]`.

        With `decoding` no token is dropped, so that what a sequence becomes depends
        neither on the others nor on the padding that they bring (`MoELayer.call`).
        """
        mask = self._mask(source_ids)
        encoding = self._encoding(mask)  # [B, L, M]
        x = self._embed(self.source_embedding, source_ids, training, encoding)
        for layer in [self.encoder_stack] if self.stacked else self.encoder_blocks:
            x = layer(
                x,
                mask=mask,
                training=training,
                decoding=decoding,
                token_ids=source_ids,
            )
        return self.encoder_norm(x), mask

    def start_decoding(
        self,
        source_ids: tf.Tensor,
        max_length: int,
        hypotheses: int = 1,
        flat: bool = False,
    ) -> DecodingState:
        """Encodes the source and makes empty caches for `max_length` target tokens.

        Args:
            source_ids: `[B, L]`.
            max_length: T, the most tokens that will be fed.
            hypotheses: K, how many sequences grow from each source. The encoder's
                keys and values are made once for all of them.
            flat: Whether those of one source share a cache that is never reordered
                (the paper's flat beam search, appendix A.1).

        Returns:
            The state for `decode_step`: a nest of tensors of static length, each with
            the batch (or the batch times K) as its first dimension; and `"weights"`, in
            the form in which each step reads them.
        """
        if not self.built:  # a new model, not called yet
            self.build()
        memory, memory_mask = self.encode(source_ids, training=False, decoding=True)
        caches, weights = [], []
        for block in self._each_decoder_block():
            caches.append(block.init_cache(memory, max_length, hypotheses, flat))
            weights.append(block.matrices())
        state = {
            "memory_mask": memory_mask,
            "blocks": caches,
            "weights": {"blocks": weights},
        }
        if self.projection is None:
            table = self.target_embedding.transposed_table()
            state["weights"]["projection"] = table
        batch = sizes(memory)[0]
        if flat:
            shape = [batch, hypotheses, max_length, hypotheses]
            state["visible"] = annotate(
                tf.zeros(shape, tf.bool), ("batch", None, None, None)
            )
        elif hypotheses > 1:
            state["parents"] = _themselves(batch, hypotheses)
        return state

    def decode_step(
        self, target_ids: tf.Tensor, state: DecodingState, index: int | tf.Tensor
    ) -> tuple[tf.Tensor, DecodingState]:
        """Feeds one target token of each sequence and predicts the next.

        No token is dropped here, whatever the capacity (see `MoELayer.call`).

        Args:
            target_ids: `[B, K]`, the tokens at position `index` (BOS at 0); or `[B]`
                for one hypothesis.
            state: From `start_decoding` or the step before.
            index: Int or scalar int32 tensor.

        Returns:
            Logits `[B, K, V]` (or `[B, V]`) in float32 of position `index + 1`, and
            the new state.
        """
        single = len(target_ids.shape) == 1
        if single:
            target_ids = target_ids[:, None]
        state, seen = dict(state), None
        if "visible" in state:
            state["visible"], seen = _see_itself(state["visible"], index)
        position = tf.reshape(tf.convert_to_tensor(index), [1])
        encoding = sinusoids(position, self.model_dim)[None]  # [1, 1, M]
        x = self._embed(self.target_embedding, target_ids, False, encoding)  # [B, K, M]
        caches, weights = [], state["weights"]
        blocks = zip(
            self._each_decoder_block(), state["blocks"], weights["blocks"], strict=True
        )
        for block, cache, matrices in blocks:
            if "parents" in state:
                cache = {**cache, "self": _reorder(cache["self"], state["parents"])}
            x, cache = block.decode(
                x, cache, index, state["memory_mask"], target_ids, seen, matrices
            )
            caches.append(cache)
        if "parents" in state:
            state["parents"] = _themselves(*sizes(target_ids))
        logits = self._logits(x, weights.get("projection"))  # [B, K, V]
        return logits[:, 0] if single else logits, {**state, "blocks": caches}

    def reorder_decoding(
        self, state: DecodingState, parents: tf.Tensor
    ) -> DecodingState:
        """The state in which hypothesis k goes on from what was `parents[:, k]`.

        Args:
            state: From `decode_step`.
            parents: `[B, K]` ints in `[0, K)`.
        """
        if "visible" in state:
            visible = tf.gather(state["visible"], parents, batch_dims=1)
            return {**state, "visible": visible}
        if "parents" not in state:  # one hypothesis
            return state
        # The next step does it: one pass over the caches for this and for its writing.
        parents = tf.gather(state["parents"], parents, batch_dims=1)
        return {**state, "parents": parents}

    def _each_decoder_block(self) -> Iterable[DecoderBlock]:
        return self.decoder_stack.blocks() if self.stacked else self.decoder_blocks

    @property
    def input_dtype(self) -> str:
        """Inputs are ids (`TokenEmbedding.input_dtype` says where they come as others).

        So `export` gives a signature of int32, whatever the policy.
        """
        return "int32"

    def _mask(self, ids: tf.Tensor) -> tf.Tensor:
        # Keras's operation, because Keras asks for the mask of symbolic inputs too.
        return keras.ops.not_equal(ids, self.pad_id)

    def _target_mask(self, ids: tf.Tensor) -> tf.Tensor:
        mask = self._mask(ids)
        if self.bos_id == self.pad_id:
            first = keras.ops.equal(keras.ops.arange(keras.ops.shape(ids)[1]), 0)
            mask = keras.ops.logical_or(mask, first)
        return mask

    def _encoding(self, mask: tf.Tensor) -> tf.Tensor:
        """The encoding `[B, L, M]` of each token's place among the real ones."""
        # Made for each position once and looked up: a sine costs more than a copy.
        encoding = sinusoids(tf.range(tf.shape(mask)[1]), self.model_dim)  # [L, M]
        return tf.gather(tf.cast(encoding, self.compute_dtype), places(mask))

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

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> tf.Tensor:
        return self._target_mask(_source_and_target(inputs)[1])

    def compute_output_shape(self, input_shape: Any) -> Any:
        target = _source_and_target(input_shape)[1]
        return (*target, self.target_vocab_size)

    def compute_output_spec(
        self, inputs: Any, training: bool | None = None, decoding: bool = False
    ) -> keras.KerasTensor:
        target = _source_and_target(inputs)[1]
        # Logits are float32 whatever the policy computes in.
        return keras.KerasTensor((*target.shape, self.target_vocab_size), "float32")

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


def _themselves(batch: int | tf.Tensor, hypotheses: int | tf.Tensor) -> tf.Tensor:
    """`[B, K]`: each hypothesis goes on from itself."""
    parents = tf.broadcast_to(tf.range(hypotheses), [batch, hypotheses])
    return annotate(parents, ("batch", None))


def _reorder(cache: dict[str, tf.Tensor], parents: tf.Tensor) -> dict[str, tf.Tensor]:
    """Caches `[B * K, ...]` of hypotheses that go on from `parents` `[B, K]`."""
    shape = sizes(parents)

    def reorder(values: tf.Tensor) -> tf.Tensor:
        rest = values.shape[1:].as_list()  # [N, T, D]
        values = tf.reshape(values, [*shape, *rest])
        values = tf.gather(values, parents, batch_dims=1)
        return tf.reshape(values, [-1, *rest])

    return {name: reorder(values) for name, values in cache.items()}


def _see_itself(
    visible: tf.Tensor, index: int | tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Adds to the mask `[B, K, T, K]` that hypothesis k sees its token at `index`.

    Returns:
        The mask, and the same as `[B, K, T * K]`.
    """
    batch, hypotheses, length, _ = sizes(visible)
    here = (tf.range(length) == index)[None, None, :, None]
    itself = tf.eye(hypotheses, dtype=tf.bool)[None, :, None, :]
    visible = tf.where(here, itself, visible)
    return visible, tf.reshape(visible, [batch, hypotheses, length * hypotheses])


def _source_and_target(inputs: Any) -> tuple[Any, Any]:
    """The two parts of `inputs`, a pair or a dict."""
    if isinstance(inputs, Mapping):
        if set(inputs) != {"source", "target"}:
            raise ValueError(
                'A dict of inputs has the keys "source" and "target". '
                f"Received: {sorted(inputs)}"
            )
        return inputs["source"], inputs["target"]
    if not isinstance(inputs, list | tuple) or len(inputs) != 2:
        raise ValueError(
            "Inputs are a pair (source_ids, target_ids) or a dict. "
            f"Received: {type(inputs).__name__}"
        )
    return inputs[0], inputs[1]
