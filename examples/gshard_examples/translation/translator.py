"""Translating with a trained model, as TensorFlow operations from strings to strings.

`exporting` makes a SavedModel of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from gshard_examples.translation.vocabulary import (
    BOS,
    EOS,
    PAD,
    Vocabulary,
)
from gshard_examples.translation.weights import StoredWeights
from keras_layers import beam_search, length_limits
from keras_layers.decoding import length_penalty

#: What the SavedModel says of a language tag that it does not know.
UNKNOWN_TAG = "unknown language tag; the vocabulary's languages are: "
#: Sentences that are decoded at a time, whatever the batch: memory stays bounded.
CHUNK = 64
#: Bytes of a text that are looked at, for each id that is read. A piece has at most
#: 16 characters of at most 4 bytes.
BYTES_PER_ID = 64

_TEXTS = tf.TensorSpec([None], tf.string, name="texts")
_LANGUAGES = tf.TensorSpec([None], tf.string, name="languages")
_TRANSLATIONS = tf.TensorSpec([None], tf.string, name="translations")


class Translator(tf.Module):
    """Strings and language tags in, English out; all of it TensorFlow operations.

    Args:
        model: The trained `Transformer`.
        vocabulary: Its vocabulary.
        max_source: Ids of a source that are read, tag and end included; longer ones
            are cut, and the results say so.
        max_target: The most ids of a translation. (The limit of a short source is
            twice its ids and ten.)
        beam_size: K of `beam_search`; 1 is greedy. All K translations are returned.
        alpha: Of its length penalty.
        weights: How matrices are stored in an exported model: "float32", "bfloat16"
            or "float16". Computation is in the model's own precision.
    """

    def __init__(
        self,
        model: keras.Model,
        vocabulary: Vocabulary,
        max_source: int = 128,
        max_target: int = 64,
        beam_size: int = 4,
        alpha: float = 0.8,
        weights: str = "float32",
    ):
        super().__init__(name="translator")
        self._model = model
        self.vocabulary = vocabulary
        self.max_source = max_source
        self.max_target = max_target
        self.beam_size = beam_size
        self.alpha = alpha
        self.weights = StoredWeights(model.variables, weights)
        #: What an exported model answers to, by signature.
        self.functions = {
            "translate": self._function(self._translate, _TEXTS, _LANGUAGES),
            "encode": self._function(self._encode, _TEXTS, _LANGUAGES),
            "score": self._function(self._score, _TEXTS, _LANGUAGES, _TRANSLATIONS),
            "tokenize": self._function(self._tokenize, _TEXTS, _LANGUAGES),
            "languages": self._function(self._languages),
        }
        #: The whole beam, to rank by several `alpha`: see `decoding_choice`.
        self.candidates = self._function(self._candidates, _TEXTS, _LANGUAGES)

    def translate(
        self, languages: Sequence[str], texts: Sequence[str], batch_size: int = CHUNK
    ) -> list[str]:
        """Translates any number of texts, those of like length together.

        Raises:
            ValueError: for an unknown language tag, or numbers that differ.
        """
        if len(languages) != len(texts):
            raise ValueError(
                "Every text needs one language tag. Received: "
                f"{len(languages)} tags and {len(texts)} texts"
            )
        self.vocabulary.check_languages(languages)
        return by_length(self._translate_some, texts, languages, batch_size)

    def _translate_some(self, texts: list[str], languages: list[str]) -> list[str]:
        result = self.functions["translate"](tf.constant(texts), tf.constant(languages))
        return [text.decode("utf-8") for text in result["translations"].numpy()]

    # ------------------------------------------------------------- the signatures

    def _translate(self, texts: tf.Tensor, languages: tf.Tensor) -> dict[str, Any]:
        """Returns the best translation of each text, and all others of the beam."""
        source, truncated = self._source(texts, languages)
        ids, scores, log_probs = self._search(source)
        texts = self._decode(tf.reshape(ids, [-1, self.max_target]))
        texts = tf.reshape(texts, [-1, self.beam_size])  # [B, n]
        # Without any text there is nothing to translate: tag and end alone.
        empty = tf.reduce_sum(tf.cast(source != PAD, tf.int32), axis=1) == 2
        texts = tf.where(empty[:, None], "", texts)
        return {
            "translations": texts[:, 0],
            "scores": scores[:, 0],
            "log_probs": log_probs[:, 0],
            "truncated": truncated,
            "unfinished": ~tf.reduce_any(ids[:, 0] == EOS, axis=-1),
            "n_best": texts,
            # JSON has no infinity, the score of a hypothesis that there is not.
            "n_best_scores": tf.maximum(scores, -1e9),
        }

    def _candidates(self, texts: tf.Tensor, languages: tf.Tensor) -> dict[str, Any]:
        """All translations that the beam ends with, `[B, n]`, and what ranks them."""
        ids, _, log_probs = self._search(self._source(texts, languages)[0])
        found = self._decode(tf.reshape(ids, [-1, self.max_target]))
        return {
            "translations": tf.reshape(found, [-1, self.beam_size]),
            "log_probs": log_probs,
            "tokens": tf.reduce_sum(tf.cast(ids != PAD, tf.int32), axis=-1),
            "ended": tf.reduce_any(ids == EOS, axis=-1),
        }

    def _encode(self, texts: tf.Tensor, languages: tf.Tensor) -> dict[str, Any]:
        """The encoder's outputs `[B, L, M]`; `mask` is False at padding."""
        source, truncated = self._source(texts, languages)
        encoded, mask = self._model.encode(source, training=False, decoding=True)
        return {
            "encoded": tf.cast(encoded, tf.float32),
            "mask": mask,
            "truncated": truncated,
        }

    def _score(
        self, texts: tf.Tensor, languages: tf.Tensor, translations: tf.Tensor
    ) -> dict[str, Any]:
        """Log-probabilities of given translations, and scores as `translate` has."""
        same = tf.debugging.assert_equal(
            tf.shape(texts),
            tf.shape(translations),
            "every text needs one translation",
        )
        with tf.control_dependencies([same]):
            source, truncated = self._source(texts, languages)
        read, cut = _first_bytes(translations, self.max_target)
        full = self.vocabulary.encode_target(read)  # [B, (T)], BOS to EOS
        cut = cut | (full.row_lengths() > self.max_target + 1)
        # What is longer is scored as far as it goes, so without an end.
        target = full[:, : self.max_target + 1].to_tensor(PAD)
        length = source.shape[1] or tf.shape(source)[1]

        def score(both: tf.Tensor) -> tuple[tf.Tensor]:
            source, target = both[:, :length], both[:, length:]
            labels = target[:, 1:]
            logits = self._model((source, target[:, :-1]), decoding=True)
            each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            real = tf.cast(labels != PAD, tf.float32)
            return (-tf.reduce_sum(each * real, axis=-1),)

        [log_probs] = _in_chunks(
            score,
            tf.concat([source, target], axis=1),
            [tf.TensorSpec([None], tf.float32)],
        )
        tokens = tf.reduce_sum(tf.cast(target[:, 1:] != PAD, tf.int32), axis=1)
        return {
            "log_probs": log_probs,
            "scores": log_probs / length_penalty(tokens, self.alpha),
            "tokens": tokens,
            "truncated": truncated | cut,
        }

    def _tokenize(self, texts: tf.Tensor, languages: tf.Tensor) -> dict[str, Any]:
        """Returns the model's input: ids `[B, L]` with tag and end, then padding."""
        source, truncated = self._source(texts, languages)
        lengths = tf.reduce_sum(tf.cast(source != PAD, tf.int32), axis=1)
        return {"ids": source, "lengths": lengths, "truncated": truncated}

    def _languages(self) -> dict[str, Any]:
        return {"languages": tf.constant(self.vocabulary.languages)}

    # ---------------------------------------------------------------- their parts

    def _function(self, fn: Callable, *specs: tf.TensorSpec) -> Any:
        # A partial of its own for each: TensorFlow counts how often functions of the
        # same code are traced, and takes several translators for one traced anew.
        with_weights = functools.partial(self._with_weights, fn)
        return tf.function(with_weights, input_signature=list(specs), autograph=False)

    def _with_weights(self, fn: Callable, *arguments: tf.Tensor) -> dict[str, Any]:
        with self.weights.in_use():
            return fn(*arguments)

    def _search(self, source: tf.Tensor) -> list[tf.Tensor]:
        """Ids `[B, n, T]` of the beam's n translations; scores, log-probabilities."""
        n = self.beam_size

        def search(source: tf.Tensor) -> tuple[tf.Tensor, ...]:
            hypotheses = beam_search(
                self._model,
                source,
                self.max_target,
                BOS,
                EOS,
                beam_size=n,
                alpha=self.alpha,
                num_results=n,
                limits=length_limits(source, PAD, 2.0, 10),
            )
            return hypotheses.ids, hypotheses.scores, hypotheses.log_probs

        return _in_chunks(
            search,
            source,
            [
                tf.TensorSpec([None, n, self.max_target], tf.int32),
                tf.TensorSpec([None, n], tf.float32),
                tf.TensorSpec([None, n], tf.float32),
            ],
        )

    def _source(
        self, texts: tf.Tensor, languages: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Ids `[B, L]`, and of which texts something was cut off, `[B]`."""
        same = tf.debugging.assert_equal(
            tf.shape(texts), tf.shape(languages), "every text needs one language tag"
        )
        known = tf.debugging.assert_equal(
            tf.reduce_all(self.vocabulary.languages_are_known(languages)),
            True,
            UNKNOWN_TAG + " ".join(self.vocabulary.languages),
        )
        with tf.control_dependencies([same, known]):
            read, cut = _first_bytes(texts, self.max_source)
            full = self.vocabulary.encode_source(languages, read)  # [B, (L)]
        cut = cut | (full.row_lengths() > self.max_source)
        kept = full[:, :-1][:, : self.max_source - 1]
        source = tf.concat([kept, full[:, -1:]], axis=1)  # the end stays
        return tf.cast(source.to_tensor(PAD), tf.int32), cut

    def _decode(self, ids: tf.Tensor) -> tf.Tensor:
        # Single bytes are symbols too, so a model can say what is no UTF-8.
        return tf.strings.unicode_transcode(
            self.vocabulary.decode(ids), "UTF-8", "UTF-8", errors="replace"
        )


def by_length(
    translate: Callable[[list[str], list[str]], list[str]],
    texts: Sequence[str],
    languages: Sequence[str],
    batch_size: int = CHUNK,
) -> list[str]:
    """Translates texts of like length together, so that little of a batch is padding.

    Args:
        translate: Given some texts and as many tags, at least one; returns their
            translations.
        texts: Any number of texts.
        languages: The tag of each.
        batch_size: The most texts that `translate` is given at once.

    Returns:
        The translation of each text, in their order.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].encode()))
    translations = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        found = translate([texts[i] for i in rows], [languages[i] for i in rows])
        for i, text in zip(rows, found, strict=True):
            translations[i] = text
    return translations


def _first_bytes(texts: tf.Tensor, ids: int) -> tuple[tf.Tensor, tf.Tensor]:
    """As much of each text as `ids` ids can be of, and where that is not all."""
    most = ids * BYTES_PER_ID
    return tf.strings.substr(texts, 0, most), tf.strings.length(texts) > most


def _in_chunks(
    fn: Callable[[tf.Tensor], tuple[tf.Tensor, ...]],
    rows: tf.Tensor,
    specs: list[tf.TensorSpec],
) -> list[tf.Tensor]:
    """`fn(rows)`, at most `CHUNK` rows `[B, ...]` at a time; of no rows too."""
    count, width = tf.shape(rows)[0], tf.shape(rows)[1]
    size = tf.clip_by_value(count, 1, CHUNK)
    chunks = tf.maximum(-(-count // size), 1)
    padded = tf.pad(rows, [[0, chunks * size - count], [0, 0]])
    results = tf.map_fn(
        fn,
        tf.reshape(padded, [chunks, size, width]),
        fn_output_signature=tuple(specs),
        parallel_iterations=1,
    )
    joined = []
    for result, spec in zip(results, specs, strict=True):
        shape = [chunks * size, *spec.shape.as_list()[1:]]
        joined.append(tf.reshape(result, shape)[:count])
    return joined
