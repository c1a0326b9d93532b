"""Protocol of decoding: the model's interface, ids, log-probabilities."""

from typing import Any, Protocol

import tensorflow as tf

from keras_layers._arguments import check_int, check_token_id

#: Stands for a log-probability of 0, finite so that sums and differences stay numbers.
IMPOSSIBLE = -1e30


class Decodable(Protocol):
    """Interface of a model that decoding needs; `Transformer` implements it.

    It may have two attributes more: `bos_id`, the id that targets begin with, required
    where that is `pad_id`; and `target_vocab_size`, V, against which ids are
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
        """Returns the state of K hypotheses for each source `[B, L]`."""

    def decode_step(
        self, target_ids: tf.Tensor, state: Any, index: tf.Tensor
    ) -> tuple[tf.Tensor, Any]:
        """Tokens `[B, K]` at position `index` -> logits `[B, K, V]` and the state.

        Greedy decoding and sampling pass `[B]` and expect `[B, V]`.
        """

    def reorder_decoding(self, state: Any, parents: tf.Tensor) -> Any:
        """Returns the state in which hypothesis k continues `parents[:, k]`.

        Only beam search calls it.
        """


def log_probabilities(logits: tf.Tensor, pad_id: int, eos_id: int) -> tf.Tensor:
    """Returns `[..., V]`, padding excluded: in a sequence it would hide the rest.

    Raises:
        ValueError: if EOS is not among the V.
    """
    check_token_id("eos_id", eos_id, logits.shape[-1])
    log_probs = tf.nn.log_softmax(logits)
    return tf.where(tf.range(logits.shape[-1]) == pad_id, IMPOSSIBLE, log_probs)


def check_ids(
    model: Decodable, max_length: Any, bos_id: Any, eos_id: Any
) -> tuple[int, int, int]:
    """Checks the arguments that all decoding functions share.

    Returns:
        `max_length`, `bos_id` and `eos_id`.

    Raises:
        ValueError: for a length below 1, an id outside the model's
            vocabulary, or one that is the model's padding.
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
    model_bos_id = getattr(model, "bos_id", None)
    if model_bos_id is None and bos_id == model.pad_id:
        raise ValueError(
            "A model whose targets begin with padding must have that as its bos_id, or "
            "it masks the first position and never learns the next: train it as "
            f"Transformer(..., bos_id={bos_id}). "
            f"Received: bos_id={bos_id}, pad_id={model.pad_id}"
        )
    if model_bos_id is not None and model_bos_id != bos_id:
        raise ValueError(
            f"bos_id must be that of the model, {model_bos_id}. "
            f"Received: bos_id={bos_id}"
        )
    return max_length, bos_id, eos_id
