"""The exported translator, loaded; nothing of this project is needed for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

# What the server reads of each signature: the inputs and the outputs.
SIGNATURES = {
    "translate": (
        ("languages", "texts"),
        (
            "translations",
            "scores",
            "truncated",
            "unfinished",
            "n_best",
            "n_best_scores",
        ),
    ),
    "languages": ((), ("languages",)),
}


class UnusableModelError(ValueError):
    """A folder that holds no translator that can be served."""


class Model:
    """A SavedModel of `gshard_examples.translation.export`.

    Args:
        folder: The SavedModel.

    Raises:
        UnusableModelError: when there is none, when it is damaged, or when it is no
            translator.
        ImportError: without tensorflow-text, whose operations it uses.
    """

    def __init__(self, folder: str | Path):
        import tensorflow_text  # noqa: F401 - registers operations

        self._name = repr(str(folder))
        if not tf.saved_model.contains_saved_model(str(folder)):
            raise UnusableModelError(
                "a folder of a SavedModel must hold the file saved_model.pb; "
                f"gshard-translate export writes one. Received: {self._name}"
            )
        with _unusable(f"the SavedModel {self._name} cannot be loaded"):
            self._loaded = tf.saved_model.load(str(folder))
            signatures = dict(self._loaded.signatures)
        _check_signatures(signatures, self._name)
        self._translate = signatures["translate"]
        with _unusable(f"the SavedModel {self._name} does not tell its languages"):
            tags = signatures["languages"]()["languages"].numpy()
            self.languages = [tag.decode() for tag in tags]
        if not self.languages:
            raise UnusableModelError(
                "the signature 'languages' of a translator must list at least one. "
                f"Received: {self._name}, which lists none"
            )

    def translate(self, items: Sequence[tuple]) -> list[dict[str, Any]]:
        """Answers `(text, tag, whether it was cut)`, as the server sends them."""
        outputs = self._translate(
            texts=tf.constant([text for text, _, _ in items], tf.string),
            languages=tf.constant([tag for _, tag, _ in items], tf.string),
        )
        outputs = {name: value.numpy() for name, value in outputs.items()}
        return [
            {
                "text": outputs["translations"][i].decode(),
                "score": float(outputs["scores"][i]),
                "truncated": bool(outputs["truncated"][i]) or items[i][2],
                "unfinished": bool(outputs["unfinished"][i]),
                "n_best": [
                    {"text": text.decode(), "score": float(score)}
                    for text, score in zip(
                        outputs["n_best"][i], outputs["n_best_scores"][i], strict=True
                    )
                ],
            }
            for i in range(len(items))
        ]

    def warm_up(self, max_batch: int) -> None:
        """Makes the first answers as quick as the others.

        Raises:
            UnusableModelError: when the model cannot translate that many texts.
        """
        tag = self.languages[0].encode()
        for count in (1, max_batch):
            with _unusable(f"the SavedModel {self._name} does not translate {count}"):
                for words in (1, 30):
                    self.translate([(b"word " * words, tag, False)] * count)


def _check_signatures(signatures: dict[str, Any], name: str) -> None:
    for key, (inputs, outputs) in SIGNATURES.items():
        if key not in signatures:
            raise UnusableModelError(
                f"a translator must have the signature {key!r}. Received: {name}, "
                f"whose signatures are {sorted(signatures)}"
            )
        taken = sorted(signatures[key].structured_input_signature[1])
        given = sorted(signatures[key].structured_outputs)
        if taken != list(inputs) or not set(outputs) <= set(given):
            raise UnusableModelError(
                f"the signature {key!r} of a translator must take {list(inputs)} and "
                f"return {sorted(outputs)}. Received: {name}, where it takes {taken} "
                f"and returns {given}"
            )


@contextlib.contextmanager
def _unusable(what: str) -> Iterator[None]:
    """Names the folder in whatever TensorFlow raises about it."""
    try:
        yield
    except Exception as error:  # a damaged file makes TensorFlow raise anything
        why = (str(error).strip().splitlines() or [""])[0]
        raise UnusableModelError(f"{what}: {type(error).__name__}: {why}") from error
