"""The vocabulary at work: strings to ids and back, in Python and inside a graph.

`vocabulary_training` says what the symbols are.  Everything here is TensorFlow ops
(TensorFlow Text's SentencePiece), so the same object serves in `tf.data`, in a
`tf.function` and in a SavedModel that takes strings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from gshard_examples.translation.languages import check_tags
from gshard_examples.translation.package_files import missing_packages
from gshard_examples.translation.vocabulary_training import (
    BOS,
    EOS,
    PAD,
    PLACEHOLDERS,
    UNK,
    language_symbol,
    train_vocabulary,
)

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "PLACEHOLDERS",
    "UNK",
    "Vocabulary",
    "language_symbol",
    "train_vocabulary",
]


class Vocabulary(tf.Module):
    """Strings to ids and back.

    Attributes:
        size: Number of symbols: ids are `0 ... size - 1`.
        languages: The language tags that have a symbol, sorted.
        sha256: Of the model file, to recognize it by.
        model_bytes: The SentencePiece model itself.

    Args:
        model: The `.model` file that `train_vocabulary` wrote, or its contents.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no SentencePiece model, or not one of this program's.
        MissingPackageError: A package that is needed is not installed.
    """

    def __init__(self, model: str | Path | bytes) -> None:
        super().__init__(name="vocabulary")
        try:
            import sentencepiece
            import tensorflow_text
        except ImportError as error:
            raise missing_packages(
                ["sentencepiece", "tensorflow-text"], "vocabularies are read with them"
            ) from error
        self._text = tensorflow_text
        if isinstance(model, bytes):
            self.model_bytes = model
        elif Path(model).is_file():
            self.model_bytes = Path(model).read_bytes()
        else:
            raise FileNotFoundError(f"no vocabulary at {model}: train one first")
        try:
            pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from error
        specials = (pieces.pad_id(), pieces.unk_id(), pieces.bos_id(), pieces.eos_id())
        if specials != (PAD, UNK, BOS, EOS):
            raise ValueError(
                "not a SentencePiece model of this program: padding, unknown, "
                "beginning and end must be its symbols 0, 1, 2, 3. Received: "
                f"{specials}"
            )
        self.size = pieces.get_piece_size()
        self.sha256 = hashlib.sha256(self.model_bytes).hexdigest()
        tag_ids = {
            pieces.id_to_piece(i)[1:-1]: i
            for i in range(EOS + 1, self.size)
            if pieces.is_control(i)
        }
        if not tag_ids:
            raise ValueError("the vocabulary has no language symbol")
        self.languages = tuple(sorted(tag_ids))
        self._tag_ids = dict(tag_ids)
        self._tag_table = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(
                tf.constant(self.languages),
                tf.constant([tag_ids[t] for t in self.languages], tf.int32),
            ),
            default_value=UNK,
        )

        # Tokenizers made inside a graph live as long as it does. What one made outside
        # refers to is gone after `keras.utils.set_random_seed`, which drops the cached
        # kernels of all operations and what they own.
        def tokenizer() -> Any:
            return tensorflow_text.SentencepieceTokenizer(
                model=self.model_bytes, out_type=tf.int32
            )

        self._tokenize = tf.function(
            lambda strings: tokenizer().tokenize(strings),
            input_signature=[tf.TensorSpec([None], tf.string)],
            autograph=False,
        )
        self._detokenize = tf.function(
            lambda ids: tokenizer().detokenize(ids),
            input_signature=[tf.RaggedTensorSpec([None, None], tf.int32)],
            autograph=False,
        )

    def language_id(self, tag: str) -> int:
        """Returns the id of a language's symbol.

        Raises:
            ValueError: The language has none.
        """
        self.check_languages([tag])
        return self._tag_ids[tag]

    def check_languages(self, tags: Sequence[str]) -> None:
        """Checks language tags that somebody gave.

        Raises:
            ValueError: One is not of this vocabulary; the nearest ones are named.
        """
        check_tags(tags, self.languages, "vocabulary")

    def encode_source(
        self,
        lang_tags: tf.Tensor | Sequence[str],
        strings: tf.Tensor | Sequence[str],
        max_length: int | None = None,
    ) -> tf.RaggedTensor:
        """Turns source texts into ids: `[<lang>, pieces ..., eos]`.

        Given Python strings, an unknown language is an error.  Given tensors (inside a
        graph, say), its id is `UNK`, since a graph can't raise a `ValueError`; see
        `languages_are_known` for an assertion there.

        Args:
            lang_tags: One language tag per text.
            strings: The texts. Bytes that are not UTF-8, control characters and white
                space count as single spaces; Unicode is put in form NFC.
            max_length: Cut longer sequences to so many ids, of which the first is the
                tag and the last is eos. None: keep all.

        Returns:
            Ragged int32 ids, [B, (L)].

        Raises:
            ValueError: An unknown language, numbers of tags and texts that differ, or
                a `max_length` below 2.
        """
        if not tf.is_tensor(lang_tags):
            lang_tags = [t.decode() if isinstance(t, bytes) else t for t in lang_tags]
            if not tf.is_tensor(strings) and len(lang_tags) != len(strings):
                raise ValueError(
                    "every text needs one language tag. Received: "
                    f"{len(lang_tags)} tags and {len(strings)} texts"
                )
            self.check_languages(lang_tags)
        if max_length is not None and max_length < 2:
            raise ValueError(
                "max_length must leave room for the language tag and eos, so be 2 or "
                f"more. Received: max_length={max_length}"
            )
        tags = self._tag_table.lookup(tf.convert_to_tensor(lang_tags, tf.string))
        pieces = self._pieces(strings)  # [B, (L)]
        if max_length is not None:
            pieces = pieces[:, : max_length - 2]
        return tf.concat(
            [tags[:, tf.newaxis], pieces, self._column(EOS, pieces)], axis=1
        )

    def encode_target(
        self, strings: tf.Tensor | Sequence[str], max_length: int | None = None
    ) -> tf.RaggedTensor:
        """Turns English texts into ids: `[bos, pieces ..., eos]`.

        Args:
            strings: The texts.
            max_length: Cut longer sequences to so many ids, eos kept. None: keep all.

        Returns:
            Ragged int32 ids, [B, (L)].

        Raises:
            ValueError: `max_length` is below 2.
        """
        if max_length is not None and max_length < 2:
            raise ValueError(
                "max_length must leave room for bos and eos, so be 2 or more. "
                f"Received: max_length={max_length}"
            )
        pieces = self._pieces(strings)
        if max_length is not None:
            pieces = pieces[:, : max_length - 2]
        return tf.concat(
            [self._column(BOS, pieces), pieces, self._column(EOS, pieces)], axis=1
        )

    def languages_are_known(self, lang_tags: tf.Tensor) -> tf.Tensor:
        """Says of each tag, in a graph, whether it is a language of the vocabulary."""
        return tf.not_equal(self._tag_table.lookup(lang_tags), UNK)

    def decode(self, ids: tf.Tensor | tf.RaggedTensor) -> tf.Tensor:
        """Turns ids into texts.

        The first eos ends a text; padding, bos and language symbols are not text; an
        id outside of the vocabulary (models round its size up) is an unknown symbol.

        Args:
            ids: int32 or int64, dense [B, L] or ragged [B, (L)].

        Returns:
            Strings, [B].
        """
        if isinstance(ids, tf.RaggedTensor):
            ids = ids.to_tensor(PAD)
        ids = tf.cast(ids, tf.int32)  # [B, L]
        ended = tf.cumsum(tf.cast(tf.equal(ids, EOS), tf.int32), axis=1) > 0
        kept = tf.logical_not(ended) & tf.not_equal(ids, PAD) & tf.not_equal(ids, BOS)
        inside = (ids >= 0) & (ids < self.size)
        ids = tf.where(inside, ids, UNK)
        return self._detokenize(tf.ragged.boolean_mask(ids, kept))

    def _pieces(self, strings: tf.Tensor | Sequence[str]) -> tf.RaggedTensor:
        strings = tf.convert_to_tensor(strings, tf.string)  # [B]
        strings = tf.strings.unicode_transcode(
            strings, "UTF-8", "UTF-8", errors="replace", replace_control_characters=True
        )
        strings = tf.strings.regex_replace(strings, r"[\s\p{Z}\x{FFFD}]+", " ")
        strings = self._text.normalize_utf8(strings, "NFC")
        return self._tokenize(strings)

    @staticmethod
    def _column(symbol: int, like: tf.RaggedTensor) -> tf.Tensor:
        return tf.fill([like.nrows(out_type=tf.int32), 1], symbol)  # [B, 1]
