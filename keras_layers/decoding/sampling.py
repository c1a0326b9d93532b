"""Sampling: tokens drawn by their probabilities, cut to the most probable ones."""

from typing import Any

import tensorflow as tf

from gshard_tf import random
from keras_layers._arguments import check_int, check_positive
from keras_layers._shapes import static_shape
from keras_layers.decoding.greedy import generate
from keras_layers.decoding.protocol import IMPOSSIBLE, Decodable, check_ids


def sample_decode(
    model: Decodable,
    source_ids: tf.Tensor,
    max_length: int,
    bos_id: int,
    eos_id: int,
    seed: Any,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    limits: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws each next token by its probability until EOS.

    Random numbers are functions of the seed, the step and the row of the batch: the
    same on any number of devices. For several samples of one source, repeat it.

    Args:
        model: See `greedy_decode`.
        source_ids: See `greedy_decode`.
        max_length: See `greedy_decode`.
        bos_id: See `greedy_decode`.
        eos_id: See `greedy_decode`.
        seed: Two ints, or an integer tensor `[2]`, as a
            `keras.random.SeedGenerator` gives.
        temperature: Logits are divided by it: below 1 nearer to greedy.
        top_k: Draw from so many of the most probable tokens only. 1 is greedy.
        top_p: Draw from the fewest most probable tokens whose probabilities sum to
            this or more (nucleus sampling, arXiv 1904.09751), after `temperature`
            and `top_k`. 0.9 is common.
        limits: See `greedy_decode`.

    Returns:
        As `greedy_decode`: ids, and the log-probability that the model gives them
        (not that of drawing them from the cut and heated distribution).

    Raises:
        ValueError: for an argument out of its range.
    """
    max_length, bos_id, eos_id = check_ids(model, max_length, bos_id, eos_id)
    temperature = check_positive("temperature", temperature)
    if top_k is not None:
        top_k = check_int("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]. Received: top_p={top_p!r}")
    seed = tf.convert_to_tensor(seed)
    if seed.shape != (2,) or not seed.dtype.is_integer:
        raise ValueError(
            "seed must be two ints, as a keras.random.SeedGenerator gives. "
            f"Received: seed={seed}"
        )
    # A key of its own for each step: seeds that follow each other share none.
    keys = random.random_bits(seed, [max_length, 2], batch_dim=None)
    keys = tf.cast(keys, tf.int64)

    def draw(log_probs: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        log_probs = log_probs / temperature
        uniform = random.uniform(keys[step], static_shape(log_probs))
        # Gumbel's trick: the largest of log p - log(-log u) is a draw from p.
        noise = -tf.math.log(-tf.math.log(tf.maximum(uniform, 1e-30)))
        if top_k is None and top_p is None:
            return tf.argmax(log_probs + noise, axis=-1, output_type=tf.int32)
        size = log_probs.shape[-1]
        best, ids = tf.math.top_k(log_probs, min(top_k or size, size))  # [B, k]
        if top_p is not None:
            probs = tf.nn.softmax(best)
            before = tf.cumsum(probs, axis=-1, exclusive=True)
            # The first stays, whatever it has.
            best = tf.where(before < top_p, best, IMPOSSIBLE)
        winner = tf.argmax(best + noise[:, : best.shape[-1]], axis=-1)
        return tf.gather(ids, winner, batch_dims=1)

    return generate(model, source_ids, max_length, bos_id, eos_id, limits, draw)
