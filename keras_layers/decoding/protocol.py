"""What all ways to decode share: the model they ask, limits, log-probabilities."""

from typing import Any, Protocol

import tensorflow as tf

from keras_layers._arguments import check_int, check_positive, check_token_id
from keras_layers._shapes import sizes

#: Stands for a log-probability of 0, finite so that sums and differences stay numbers.
IMPOSSIBLE = -1e30


class Decodable(Protocol):
    """What decoding asks of a model; `Transformer` has it, and says more about it.

    It may have two attributes more: `bos_id`, the id that targets begin with, which it
    has to say where that is `pad_id`; and `target_vocab_size`, V, against which ids are
    checked before work starts.
    """

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
    pad_id = check_int("pad_id", pad_id, 0)
    factor = check_positive("factor", factor)
    extra = check_int("extra", extra, 0)
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


def log_probabilities(logits: tf.Tensor, pad_id: int, eos_id: int) -> tf.Tensor:
    """`[..., V]`, without padding: within a sequence it would hide what follows.

    Raises:
        ValueError: if EOS is not among the V.
    """
    check_token_id("eos_id", eos_id, logits.shape[-1])
    log_probs = tf.nn.log_softmax(logits)
    return tf.where(tf.range(logits.shape[-1]) == pad_id, IMPOSSIBLE, log_probs)


def check_ids(
    model: Decodable, max_length: Any, bos_id: Any, eos_id: Any
) -> tuple[int, int, int]:
    """Checks what all ways to decode are told, before work starts.

    Returns:
        `max_length`, `bos_id` and `eos_id`.

    Raises:
        ValueError: for a length below 1, an id that is none of the model's
            vocabulary, or one that means padding to the model.
    """
    max_length = check_int("max_length", max_length, 1)
    bos_id = check_int("bos_id", bos_id, 0)
    eos_id = check_int("eos_id", eos_id, 0)
    vocab_size = getattr(model, "target_vocab_size", None)
    if vocab_size is not None:
        check_token_id("bos_id", bos_id, vocab_size)
        check_token_id("eos_id", eos_id, vocab_size)
    if eos_id == model.pad_id:
        raise ValueError(
            "eos_id must not be the id of padding: padding is never generated, and "
            "left out of the loss, so no sequence would end. Give the end of a "
            "sequence an id of its own, in training as well. "
            f"Received: eos_id={eos_id}, pad_id={model.pad_id}"
        )
    begin = getattr(model, "bos_id", None)
    if begin is None and bos_id == model.pad_id:
        raise ValueError(
            "A model whose targets begin with padding has to know it, or it takes the "
            "first position for padding and never learns what follows it: train it as "
            f"Transformer(..., bos_id={bos_id}). "
            f"Received: bos_id={bos_id}, pad_id={model.pad_id}"
        )
    if begin is not None and begin != bos_id:
        raise ValueError(
            f"The model's targets begin with bos_id={begin}. Received: bos_id={bos_id}"
        )
    return max_length, bos_id, eos_id
