"""What all ways to decode share: the model they ask, limits, log-probabilities."""

from typing import Any, Protocol

import tensorflow as tf

from keras_layers.checks import check_int, check_positive
from keras_layers.shapes import sizes

#: Stands for a log-probability of 0, finite so that sums and differences stay numbers.
IMPOSSIBLE = -1e30


class Decodable(Protocol):
    """What decoding asks of a model; `Transformer` has it, and says more about it."""

    pad_id: int

    def start_decoding(
        self,
        source_ids: tf.Tensor,
        max_length: int,
        hypotheses: int = 1,
        flat: bool = False,
    ) -> Any:
        """The state of K hypotheses for each source `[B, L]`."""

    def decode_step(
        self, target_ids: tf.Tensor, state: Any, index: tf.Tensor
    ) -> tuple[tf.Tensor, Any]:
        """Tokens `[B, K]` at position `index` -> logits `[B, K, V]` and the state.

        Greedy decoding and sampling give `[B]` and want `[B, V]`.
        """

    def reorder_decoding(self, state: Any, parents: tf.Tensor) -> Any:
        """The state in which hypothesis k goes on from what was `parents[:, k]`.

        Beam search alone asks for it.
        """


def length_limits(
    source_ids: tf.Tensor, pad_id: int = 0, factor: float = 1.5, extra: int = 10
) -> tf.Tensor:
    """The most tokens for each source: `ceil(factor * its length) + extra`.

    Args:
        source_ids: `[B, L]`, padded with `pad_id`.
        pad_id: Id of padding.
        factor: Target tokens per source token. Well above the usual ratio of the two
            languages: it is there to stop what does not end by itself.
        extra: For short sources, whose ratio varies most.

    Returns:
        int32 `[B]`: the `limits` of `greedy_decode`, `sample_decode`, `beam_search`.

    Raises:
        ValueError: for a factor of 0 or less, or a negative number.
    """
    check_int("pad_id", pad_id, 0)
    check_positive("factor", factor)
    check_int("extra", extra, 0)
    real = tf.cast(tf.not_equal(source_ids, pad_id), tf.float32)
    lengths = tf.math.ceil(factor * tf.reduce_sum(real, axis=-1))
    return tf.cast(lengths, tf.int32) + extra


def row_limits(
    source_ids: tf.Tensor, max_length: int, limits: tf.Tensor | None
) -> tf.Tensor:
    """The most tokens of each row, int32 `[B]`, in `[1, max_length]`."""
    if limits is None:
        return tf.fill([sizes(source_ids)[0]], max_length)
    return tf.clip_by_value(tf.cast(limits, tf.int32), 1, max_length)


def log_probabilities(logits: tf.Tensor, pad_id: int) -> tf.Tensor:
    """`[..., V]`, without padding: within a sequence it would hide what follows."""
    log_probs = tf.nn.log_softmax(logits)
    return tf.where(tf.range(logits.shape[-1]) == pad_id, IMPOSSIBLE, log_probs)


def check_ids(max_length: Any, bos_id: Any, eos_id: Any) -> None:
    """Raises ValueError for a length below 1 or a negative id."""
    check_int("max_length", max_length, 1)
    check_int("bos_id", bos_id, 0)
    check_int("eos_id", eos_id, 0)
