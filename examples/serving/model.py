"""The exported translator, loaded; nothing of this project is needed for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf


class Model:
    """A SavedModel of `examples.translation.exporting`.

    Args:
        folder: The SavedModel.

    Raises:
        OSError: when there is none.
        ImportError: without tensorflow-text, whose operations it uses.
    """

    def __init__(self, folder: str | Path):
        import tensorflow_text  # noqa: F401 - registers operations

        self._loaded = tf.saved_model.load(str(folder))
        signatures = self._loaded.signatures
        self._translate = signatures["translate"]
        found = signatures["languages"]()["languages"].numpy()
        self.languages = [tag.decode() for tag in found]

    def translate(self, items: Sequence[tuple]) -> list[dict[str, Any]]:
        """Answers `(text, tag, whether it was cut)`, as the server sends them."""
        found = self._translate(
            texts=tf.constant([text for text, _, _ in items], tf.string),
            languages=tf.constant([tag for _, tag, _ in items], tf.string),
        )
        found = {name: value.numpy() for name, value in found.items()}
        return [
            {
                "text": found["translations"][i].decode(),
                "score": float(found["scores"][i]),
                "truncated": bool(found["truncated"][i]) or items[i][2],
                "unfinished": bool(found["unfinished"][i]),
                "n_best": [
                    {"text": text.decode(), "score": float(score)}
                    for text, score in zip(
                        found["n_best"][i], found["n_best_scores"][i], strict=True
                    )
                ],
            }
            for i in range(len(items))
        ]

    def warm_up(self, max_batch: int) -> None:
        """Makes the first answers as quick as the others."""
        tag = self.languages[0].encode()
        for count in (1, max_batch):
            for words in (1, 30):
                self.translate([(b"word " * words, tag, False)] * count)
