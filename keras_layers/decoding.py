"""Generating target sequences with a cached decoder."""

from typing import Any

import tensorflow as tf

from keras_layers.checks import check_int
from keras_layers.shapes import sizes


def greedy_decode(
    model: Any,
    source_ids: tf.Tensor,
    max_length: int,
    bos_id: int,
    eos_id: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Takes the most probable next token until EOS.

    Padding is never taken: within a sequence it would be hidden from what follows.
    One pass of the decoder per token, over caches of static length, and no longer
    than the longest output needs. Wrap it in `tf.function` (with or without
    `jit_compile=True`) to run it as one program.

    Args:
        model: A `Transformer`, or a model with its `start_decoding`, `decode_step`
            and `pad_id`.
        source_ids: `[B, L]` ids, padded with `pad_id`.
        max_length: Length of the outputs, EOS included.
        bos_id: First input of the decoder; not part of the outputs.
        eos_id: Ends a sequence; what follows is padding.

    Returns:
        Ids `[B, max_length]` of the dtype of `source_ids`, and the sum of the
        log-probabilities of each sequence's tokens (EOS included), float32 `[B]`.

    Raises:
        ValueError: for a length below 1 or a negative id.
    """
    check_int("max_length", max_length, 1)
    check_int("bos_id", bos_id, 0)
    check_int("eos_id", eos_id, 0)
    source_ids = tf.convert_to_tensor(source_ids)
    state = model.start_decoding(source_ids, max_length)
    batch = sizes(source_ids)[0]
    position = tf.range(max_length)

    def unfinished(step, tokens, ids, done, log_prob, state):
        return tf.logical_and(step < max_length, tf.logical_not(tf.reduce_all(done)))

    def next_token(step, tokens, ids, done, log_prob, state):
        logits, state = model.decode_step(tokens, state, step)  # [B, V]
        log_probs = tf.nn.log_softmax(logits)
        log_probs = tf.where(
            tf.range(logits.shape[-1]) == model.pad_id, -1e30, log_probs
        )
        best = tf.argmax(log_probs, axis=-1, output_type=ids.dtype)  # [B]
        gain = tf.reduce_max(log_probs, axis=-1)
        log_prob = log_prob + tf.where(done, 0.0, gain)
        best = tf.where(done, tf.cast(model.pad_id, ids.dtype), best)
        ids = tf.where((position == step)[None, :], best[:, None], ids)
        done = tf.logical_or(done, best == eos_id)
        return step + 1, best, ids, done, log_prob, state

    _, _, ids, _, log_prob, _ = tf.while_loop(
        unfinished,
        next_token,
        (
            tf.constant(0),
            tf.fill([batch], tf.cast(bos_id, source_ids.dtype)),
            tf.fill([batch, max_length], tf.cast(model.pad_id, source_ids.dtype)),
            tf.zeros([batch], tf.bool),
            tf.zeros([batch], tf.float32),
            state,
        ),
        maximum_iterations=max_length,
    )
    return ids, log_prob
