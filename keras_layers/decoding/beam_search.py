"""Beam search: the K best hypotheses of each row grow side by side."""

from typing import Any, NamedTuple

import tensorflow as tf

from keras_layers._arguments import check_coefficient, check_int
from keras_layers._shapes import static_shape
from keras_layers.decoding.limits import row_limits
from keras_layers.decoding.protocol import (
    IMPOSSIBLE,
    Decodable,
    check_ids,
    log_probabilities,
)


class Hypotheses(NamedTuple):
    """The best sequences of each row, best first.

    Attributes:
        ids: `[B, n, max_length]`, EOS included, then padding.
        scores: float32 `[B, n]`, what they are ranked by: `log_probs` over the
            length's penalty.
        log_probs: float32 `[B, n]`, the sum over the tokens, EOS included.
    """

    ids: tf.Tensor
    scores: tf.Tensor
    log_probs: tf.Tensor


def length_penalty(length: tf.Tensor, alpha: float) -> tf.Tensor:
    """`((5 + length) / 6) ** alpha` (Wu et al., arXiv 1609.08144, equation 14).

    lingvo's `((5 + length) / 5) ** alpha` ranks alike: the two differ by a factor.
    """
    return ((5.0 + tf.cast(length, tf.float32)) / 6.0) ** alpha


def beam_search(
    model: Decodable,
    source_ids: tf.Tensor,
    max_length: int,
    bos_id: int,
    eos_id: int,
    beam_size: int = 4,
    alpha: float = 0.8,
    num_results: int = 1,
    limits: tf.Tensor | None = None,
    early_stop: bool = True,
    flat: bool = False,
) -> Hypotheses:
    """Finds the best target sequences among those that a beam keeps.

    At each step every row's K hypotheses are extended by every token, and the best of
    these continue, or have ended if the token is EOS. Equal scores are ordered by the
    hypothesis extended, then by the token's id, so that results do not depend on how
    the search is compiled or partitioned. A row's results depend on nothing else in
    the batch. Everything has a static shape; wrap it in `tf.function`, with or without
    `jit_compile=True`.

    Args:
        model: A `Transformer`, or a model with what `Decodable` lists.
        source_ids: `[B, L]` ids, padded with `pad_id`.
        max_length: Length of the outputs, EOS included.
        bos_id: See `greedy_decode`.
        eos_id: See `greedy_decode`.
        beam_size: K. 1 is greedy. 4 or 5 are common; time grows with it, quality
            rarely beyond 8.
        alpha: Of the length penalty: 0 ranks by log-probability, which favors short
            outputs; 1 nearly by the mean over tokens. 0.6 to 1 are common, 0.8 is
            lingvo's for this model.
        num_results: n of the best to return, at most K.
        limits: `[B]` ints, the most tokens of each row (see `length_limits`).
        early_stop: True: a row is done once K of its hypotheses have ended, each
            among the K best extensions when it did (as in fairseq, and in Hugging
            Face transformers with `early_stopping=True`). False: when no growing
            hypothesis can surpass the worst of the n best that have ended
            (as in tf-models-official): longer, and of higher scores.
        flat: Whether the hypotheses of a row share one cache, which is never
            reordered (the paper's flat beam search, appendix A.1). The results are
            the same; attention is over K times as many keys.

    Returns:
        `Hypotheses`. Where fewer than n have ended when a row stops, the best that
        were still growing follow them; after those, padding with a
        score of minus infinity.

    Raises:
        ValueError: for an argument out of its range.
    """
    max_length, bos_id, eos_id = check_ids(model, max_length, bos_id, eos_id)
    beam_size = check_int("beam_size", beam_size, 1)
    alpha = check_coefficient("alpha", alpha)
    num_results = check_int("num_results", num_results, 1)
    if num_results > beam_size:
        raise ValueError(
            "num_results must be at most beam_size. "
            f"Received: num_results={num_results}, beam_size={beam_size}"
        )
    source_ids = tf.convert_to_tensor(source_ids)
    search = _BeamSearch(
        model, eos_id, beam_size, alpha, num_results, early_stop, max_length
    )
    batch = static_shape(source_ids)[0]
    initial = tf.constant([0.0] + [IMPOSSIBLE] * (beam_size - 1))
    padding = tf.fill([batch, beam_size, max_length], model.pad_id)
    impossible = tf.fill([batch, beam_size], IMPOSSIBLE)
    state = {
        "step": tf.constant(0),
        "limits": row_limits(source_ids, max_length, limits),
        "done": tf.zeros([batch], tf.bool),
        "tokens": tf.fill([batch, beam_size], bos_id),
        "growing": {"ids": padding, "log_probs": tf.tile(initial[None], [batch, 1])},
        "ended": {"ids": padding, "scores": impossible, "log_probs": impossible},
        "model": model.start_decoding(source_ids, max_length, beam_size, flat),
    }
    state = tf.while_loop(
        search.unfinished, search.step, [state], maximum_iterations=max_length
    )[0]
    hypotheses = search.results(state)
    return hypotheses._replace(ids=tf.cast(hypotheses.ids, source_ids.dtype))


class _BeamSearch(NamedTuple):
    """Arguments of a beam search; the methods are its loop. K = `beam_size`."""

    model: Decodable
    eos_id: int
    beam_size: int
    alpha: float
    num_results: int
    early_stop: bool
    max_length: int

    def unfinished(self, state: dict[str, Any]) -> tf.Tensor:
        return tf.logical_not(tf.reduce_all(state["done"]))

    def step(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        size, old, done = self.beam_size, state["growing"], state["done"]
        logits, model_state = self.model.decode_step(
            state["tokens"], state["model"], state["step"]
        )  # [B, K, V]
        log_probs = log_probabilities(logits, self.model.pad_id, self.eos_id)
        log_probs = log_probs + old["log_probs"][..., None]
        # Twice as many as grow: K of them at most can be ends, one of each.
        batch, _, vocab = static_shape(log_probs)
        best, where = tf.math.top_k(
            tf.reshape(log_probs, [batch, size * vocab]), 2 * size
        )  # [B, 2K]
        parents, tokens = where // vocab, where % vocab
        ids = tf.gather(old["ids"], parents, batch_dims=1)  # [B, 2K, T]
        here = tf.range(self.max_length) == state["step"]
        ids = tf.where(here, tokens[..., None], ids)
        is_end = tokens == self.eos_id

        ended = self._add_ended(state, ids, best, is_end)
        _, order = tf.math.top_k(tf.where(is_end, -float("inf"), best), size)
        growing = {
            "ids": tf.gather(ids, order, batch_dims=1),
            "log_probs": tf.gather(best, order, batch_dims=1),
        }
        parents = tf.gather(parents, order, batch_dims=1)  # [B, K]
        after = {
            "step": state["step"] + 1,
            "limits": state["limits"],
            "tokens": tf.gather(tokens, order, batch_dims=1),
            "growing": _keep_where(done, old, growing),
            "ended": _keep_where(done, state["ended"], ended),
            "model": self.model.reorder_decoding(model_state, parents),
        }
        after["done"] = done | self._is_done(after)
        return [after]

    def _add_ended(
        self, state: dict[str, Any], ids: tf.Tensor, best: tf.Tensor, is_end: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Returns the K best of those that ended before and those that end now."""
        if self.early_stop:
            # Ends count towards K, so those that are worse than the K best extensions
            # are left out; with K = 1 that is greedy search.
            is_end = is_end & (tf.range(2 * self.beam_size) < self.beam_size)
        is_end = is_end & (best > IMPOSSIBLE / 2)
        log_probs = tf.where(is_end, best, IMPOSSIBLE)
        scores = log_probs / length_penalty(state["step"] + 1, self.alpha)
        new = {
            "ids": ids,
            "scores": tf.where(is_end, scores, IMPOSSIBLE),
            "log_probs": log_probs,
        }
        both = {
            name: tf.concat([state["ended"][name], new[name]], axis=1) for name in new
        }
        _, order = tf.math.top_k(both["scores"], self.beam_size)
        return {
            name: tf.gather(value, order, batch_dims=1) for name, value in both.items()
        }

    def _is_done(self, state: dict[str, Any]) -> tf.Tensor:
        """`[B]`: rows whose results are settled, or which are at their limit."""
        ended = state["ended"]["scores"]
        if self.early_stop:
            settled = ended[:, -1] > IMPOSSIBLE / 2
        else:
            # Log-probabilities only fall, and no penalty is larger than the last.
            bound = state["growing"]["log_probs"][:, 0] / length_penalty(
                state["limits"], self.alpha
            )
            settled = ended[:, self.num_results - 1] > bound
        return settled | (state["step"] >= state["limits"])

    def results(self, state: dict[str, Any]) -> Hypotheses:
        """Returns the n best: first the ended ones, then those still growing."""
        ended, growing = state["ended"], state["growing"]
        length = tf.reduce_sum(
            tf.cast(growing["ids"] != self.model.pad_id, tf.int32), axis=-1
        )
        penalty = length_penalty(length, self.alpha)
        growing = {**growing, "scores": growing["log_probs"] / penalty}
        real = ended["scores"] > IMPOSSIBLE / 2
        count = tf.reduce_sum(tf.cast(real, tf.int32), axis=1)[:, None]
        place = tf.range(self.num_results)[None]  # [1, n]
        # Both are in order, and no more of the one are needed than the other has.
        take = tf.where(place < count, place, self.beam_size + place - count)
        best = {
            name: tf.gather(
                tf.concat([ended[name], growing[name]], axis=1), take, batch_dims=1
            )
            for name in ended
        }
        real = best["log_probs"] > IMPOSSIBLE / 2
        return Hypotheses(
            tf.where(real[..., None], best["ids"], self.model.pad_id),
            tf.where(real, best["scores"], -float("inf")),
            tf.where(real, best["log_probs"], -float("inf")),
        )


def _keep_where(done: tf.Tensor, old: Any, new: Any) -> Any:
    """Nests of tensors `[B, ...]`: `old` in the rows that are done, else `new`."""

    def keep(before: tf.Tensor, after: tf.Tensor) -> tf.Tensor:
        rows = tf.reshape(done, [-1] + [1] * (len(before.shape) - 1))
        return tf.where(rows, before, after)

    return tf.nest.map_structure(keep, old, new)
