"""Greedy decoding, and the loop that it shares with sampling."""

from collections.abc import Callable

import tensorflow as tf

from keras_layers._shapes import static_shape
from keras_layers.decoding.limits import row_limits
from keras_layers.decoding.protocol import (
    Decodable,
    check_ids,
    log_probabilities,
)


def greedy_decode(
    model: Decodable,
    source_ids: tf.Tensor,
    max_length: int,
    bos_id: int,
    eos_id: int,
    limits: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Takes the most probable next token until EOS.

    Padding is never chosen: within a sequence it would be hidden from what follows.
    One pass of the decoder per token, over caches of static length, and no longer
    than the longest output needs. Wrap it in `tf.function` (with or without
    `jit_compile=True`) to run it as one program.

    Args:
        model: A `Transformer`, or a model with its `start_decoding`, `decode_step`
            and `pad_id`.
        source_ids: `[B, L]` ids, padded with `pad_id`.
        max_length: Length of the outputs, EOS included.
        bos_id: First input of the decoder; not part of the outputs. It may be `pad_id`
            if the model has it as its own (`Transformer(bos_id=...)`).
        eos_id: Ends a sequence; what follows is padding. Not `pad_id`.
        limits: `[B]` ints, the most tokens of each row (see `length_limits`), where
            that is less than `max_length`.

    Returns:
        Ids `[B, max_length]` of the dtype of `source_ids`, and the sum of the
        log-probabilities of each sequence's tokens (EOS included), float32 `[B]`.

    Raises:
        ValueError: for a length below 1, an id outside the vocabulary, or one that
            is the model's padding.
    """

    def most_probable(log_probs: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        return tf.argmax(log_probs, axis=-1, output_type=tf.int32)

    return generate(
        model, source_ids, max_length, bos_id, eos_id, limits, most_probable
    )


def generate(
    model: Decodable,
    source_ids: tf.Tensor,
    max_length: int,
    bos_id: int,
    eos_id: int,
    limits: tf.Tensor | None,
    choose: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Generalization of `greedy_decode` to any choice of the next token.

    Args:
        choose: `(log_probs [B, V], step) -> [B]` int32 ids.
    """
    max_length, bos_id, eos_id = check_ids(model, max_length, bos_id, eos_id)
    source_ids = tf.convert_to_tensor(source_ids)
    limits = row_limits(source_ids, max_length, limits)
    batch = static_shape(source_ids)[0]
    position = tf.range(max_length)

    def unfinished(step, tokens, ids, done, log_prob, state):
        return tf.logical_and(step < max_length, tf.logical_not(tf.reduce_all(done)))

    def next_token(step, tokens, ids, done, log_prob, state):
        logits, state = model.decode_step(tokens, state, step)  # [B, V]
        log_probs = log_probabilities(logits, model.pad_id, eos_id)
        chosen = choose(log_probs, step)  # [B]
        gain = tf.gather(log_probs, chosen, batch_dims=1)
        log_prob = log_prob + tf.where(done, 0.0, gain)
        chosen = tf.where(done, model.pad_id, chosen)
        ids = tf.where((position == step)[None, :], chosen[:, None], ids)
        done = done | (chosen == eos_id) | (step + 1 >= limits)
        return step + 1, chosen, ids, done, log_prob, state

    _, _, ids, _, log_prob, _ = tf.while_loop(
        unfinished,
        next_token,
        (
            tf.constant(0),
            tf.fill([batch], bos_id),
            tf.fill([batch, max_length], model.pad_id),
            tf.zeros([batch], tf.bool),
            tf.zeros([batch], tf.float32),
            model.start_decoding(source_ids, max_length),
        ),
        maximum_iterations=max_length,
    )
    return tf.cast(ids, source_ids.dtype), log_prob
