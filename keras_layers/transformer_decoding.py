"""Decoding of the `Transformer` token by token, over caches."""

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from gshard_tf import annotate
from keras_layers._shapes import static_shape
from keras_layers.blocks import DecoderBlock
from keras_layers.embedding import sinusoids

DecodingState = dict[str, Any]


class TransformerDecoding(keras.Model):
    """Base of `Transformer` with the methods that `Decodable` lists.

    A subclass has the layers, `encode`, `_embed` and `_logits`.
    """

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
            the form that each step reads.
        """
        if not self.built:  # a new model, not called yet
            self.build()
        memory, memory_mask = self.encode(source_ids, training=False, decoding=True)
        caches, weights = [], []
        for block in self._each_decoder_block():
            caches.append(block.init_cache(memory, max_length, hypotheses, flat))
            weights.append(block.decode_kernels())
        state = {
            "memory_mask": memory_mask,
            "blocks": caches,
            "weights": {"blocks": weights},
        }
        if self.projection is None:
            table = self.target_embedding.transposed_table()
            state["weights"]["projection"] = table
        batch = static_shape(memory)[0]
        if flat:
            shape = [batch, hypotheses, max_length, hypotheses]
            state["visible"] = annotate(
                tf.zeros(shape, tf.bool), ("batch", None, None, None)
            )
        elif hypotheses > 1:
            state["parents"] = _identity_parents(batch, hypotheses)
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
            state["visible"], seen = _mark_own_position(state["visible"], index)
        position = tf.reshape(tf.convert_to_tensor(index), [1])
        encoding = sinusoids(position, self.model_dim)[None]  # [1, 1, M]
        x = self._embed(self.target_embedding, target_ids, False, encoding)  # [B, K, M]
        caches, weights = [], state["weights"]
        blocks = zip(
            self._each_decoder_block(), state["blocks"], weights["blocks"], strict=True
        )
        for block, cache, kernels in blocks:
            if "parents" in state:
                cache = {
                    **cache,
                    "self": _reorder_cache(cache["self"], state["parents"]),
                }
            x, cache = block.decode(
                x, cache, index, state["memory_mask"], target_ids, seen, kernels
            )
            caches.append(cache)
        if "parents" in state:
            state["parents"] = _identity_parents(*static_shape(target_ids))
        logits = self._logits(x, weights.get("projection"))  # [B, K, V]
        return logits[:, 0] if single else logits, {**state, "blocks": caches}

    def reorder_decoding(
        self, state: DecodingState, parents: tf.Tensor
    ) -> DecodingState:
        """Returns the state in which hypothesis k continues `parents[:, k]`.

        Args:
            state: From `decode_step`.
            parents: `[B, K]` ints in `[0, K)`.
        """
        if "visible" in state:
            visible = tf.gather(state["visible"], parents, batch_dims=1)
            return {**state, "visible": visible}
        if "parents" not in state:  # one hypothesis
            return state
        # Deferred to the next step: one pass over the caches for this and its write.
        parents = tf.gather(state["parents"], parents, batch_dims=1)
        return {**state, "parents": parents}

    def _each_decoder_block(self) -> Iterable[DecoderBlock]:
        return self.decoder_stack.blocks() if self.stacked else self.decoder_blocks


def _identity_parents(batch: int | tf.Tensor, hypotheses: int | tf.Tensor) -> tf.Tensor:
    """Returns `[B, K]` parents in which each hypothesis continues itself."""
    parents = tf.broadcast_to(tf.range(hypotheses), [batch, hypotheses])
    return annotate(parents, ("batch", None))


def _reorder_cache(
    cache: dict[str, tf.Tensor], parents: tf.Tensor
) -> dict[str, tf.Tensor]:
    """Returns caches `[B * K, ...]` of hypotheses that continue `parents` `[B, K]`."""
    shape = static_shape(parents)

    def reorder(values: tf.Tensor) -> tf.Tensor:
        rest = values.shape[1:].as_list()  # [N, T, D]
        values = tf.reshape(values, [*shape, *rest])
        values = tf.gather(values, parents, batch_dims=1)
        return tf.reshape(values, [-1, *rest])

    return {name: reorder(values) for name, values in cache.items()}


def _mark_own_position(
    visible: tf.Tensor, index: int | tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Marks in `[B, K, T, K]` that hypothesis k sees its own token at `index`.

    Returns:
        The mask, and its reshape `[B, K, T * K]`.
    """
    batch, hypotheses, length, _ = static_shape(visible)
    here = (tf.range(length) == index)[None, None, :, None]
    itself = tf.eye(hypotheses, dtype=tf.bool)[None, :, None, :]
    visible = tf.where(here, itself, visible)
    return visible, tf.reshape(visible, [batch, hypotheses, length * hypotheses])
