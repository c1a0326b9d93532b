"""Translating with a trained model: in Python, and as a SavedModel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from examples.translation.vocabulary import BOS, EOS, PAD, Vocabulary
from gshard_files import new_folder
from keras_layers import greedy_decode

#: What the SavedModel says of a language tag that it does not know.
UNKNOWN_TAG = "unknown language tag; the vocabulary's languages are: "


class Translator(tf.Module):
    """Strings and language tags in, English out; all of it TensorFlow operations.

    Args:
        model: The trained `Transformer`.
        vocabulary: Its vocabulary.
        max_source: Ids of a source that are read, tag and end included; longer ones
            are cut.
        max_target: The most ids of a translation.
    """

    def __init__(
        self,
        model: keras.Model,
        vocabulary: Vocabulary,
        max_source: int = 128,
        max_target: int = 64,
    ):
        super().__init__(name="translator")
        self._model = model
        self.vocabulary = vocabulary
        self.max_source = max_source
        self.max_target = max_target
        self.graph = tf.function(
            self._translate,
            input_signature=[
                tf.TensorSpec([None], tf.string, name="texts"),
                tf.TensorSpec([None], tf.string, name="languages"),
            ],
            autograph=False,
        )

    def _translate(self, texts: tf.Tensor, languages: tf.Tensor) -> dict[str, Any]:
        same = tf.debugging.assert_equal(
            tf.shape(texts), tf.shape(languages), "every text needs one language tag"
        )
        known = tf.debugging.assert_equal(
            tf.reduce_all(self.vocabulary.languages_are_known(languages)),
            True,
            UNKNOWN_TAG + " ".join(self.vocabulary.languages),
        )
        with tf.control_dependencies([same, known]):
            source = self.vocabulary.encode_source(
                languages, texts, max_length=self.max_source
            ).to_tensor(PAD)  # [B, L]
        source = tf.cast(source, tf.int32)
        ids, log_prob = greedy_decode(self._model, source, self.max_target, BOS, EOS)
        return {"translations": self.vocabulary.decode(ids), "scores": log_prob}

    def translate(
        self, languages: Sequence[str], texts: Sequence[str], batch_size: int = 64
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
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].encode()))
        found: list[str] = [""] * len(texts)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            result = self.graph(
                tf.constant([texts[i] for i in rows]),
                tf.constant([languages[i] for i in rows]),
            )
            for i, text in zip(rows, result["translations"].numpy(), strict=True):
                found[i] = text.decode("utf-8", "replace")
        return found


def export(translator: Translator, folder: str | Path, replace: bool = False) -> Path:
    """Writes a SavedModel: it needs tensorflow and tensorflow-text, nothing of ours.

    Its signature `serving_default` takes `texts` and `languages`, strings `[B]` for
    any B, and gives `translations` and `scores` (log-probabilities), `[B]`.

    Args:
        translator: What to export. Its model must be a plain Keras model, not one
            on a mesh (`training.load_model` gives such a one).
        folder: Where to write it; it appears only when it is complete.
        replace: Whether to replace a folder that is there.

    Returns:
        `folder`.

    Raises:
        FileExistsError: `folder` exists and `replace` is false.
        OSError: it could not be written.
    """
    folder = Path(folder)
    archive = keras.export.ExportArchive()
    archive.track(translator._model)
    archive.track(translator.vocabulary)
    archive.add_endpoint("serving_default", translator.graph)
    with new_folder(folder, replace=replace) as partial:
        archive.write_out(str(partial), verbose=False)
    return folder
