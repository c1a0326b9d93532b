"""A trained translator in one call: from its run's folder, or from its SavedModel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from gshard_examples.translation.languages import check_tags
from gshard_tf.io.paths import local_path

#: Given texts and as many language tags; returns the translations.
Translate = Callable[[list[str], list[str]], list[str]]


class LoadedTranslator:
    """Translates texts into English; `load` makes one.

    ```python
    translator = load("runs/default")
    translator(["Guten Tag", "Datei öffnen"], "de")
    translator(["Guten Tag", "Bonjour"], ["de", "fr"])
    ```

    Args:
        path: Where it was loaded from.
        languages: The tags that it knows.
        translate: What translates any number of texts with known tags.

    Attributes:
        path: As given.
        languages: The tags that it knows, sorted.
    """

    def __init__(self, path: Path, languages: Sequence[str], translate: Translate):
        self.path = path
        self.languages = tuple(sorted(languages))
        self._translate = translate

    def __call__(
        self, texts: Sequence[str], languages: str | Sequence[str]
    ) -> list[str]:
        """Translates texts, those of like length together.

        Args:
            texts: The texts, any number of them. An empty one is translated to an
                empty one; of a long one the beginning is read (128 ids; the signature
                `translate` of an exported model says where that happened).
            languages: The language tag of all texts, or a list of one for each:
                `"de"`, `"sr_Latn"`. `self.languages` has all.

        Returns:
            One English text for each, in their order.

        Raises:
            TypeError: `texts` is one string, or holds anything but strings; so do
                `languages`.
            ValueError: The numbers differ, or a language is not known; the error
                names those whose tags are like it.
        """
        texts = _strings(texts, "texts")
        if isinstance(languages, str):
            # An unknown language is an error for no texts too.
            check_tags([languages], self.languages, "translator")
            tags = [languages] * len(texts)
        else:
            tags = _strings(languages, "languages")
            if len(tags) != len(texts):
                raise ValueError(
                    "`languages` must be one tag, or one for each text. Received: "
                    f"{len(tags)} tags and {len(texts)} texts"
                )
            check_tags(tags, self.languages, "translator")
        return self._translate(texts, tags) if texts else []

    def __repr__(self) -> str:
        return f"<translator of {len(self.languages)} languages from {self.path}>"


def load(
    path: str | Path, beam_size: int | None = None, alpha: float | None = None
) -> LoadedTranslator:
    """Loads a trained translator.

    Args:
        path: The folder of a run (`gshard-translate train --run`), whose last
            checkpoint is taken, or that of a SavedModel (`gshard-translate export`).
            What is in it decides which it is.
        beam_size: Hypotheses of beam search, for a run: 1 is greedy and fastest. By
            default the number that `gshard-translate evaluate` chose on dev pairs, or
            4 where it has not been run. In a SavedModel it was decided by its export.
        alpha: Exponent of beam search's length penalty, for a run; by default the one
            that was chosen likewise, or 0.8.
            Larger values prefer longer translations.

    Returns:
        What translates: `load(path)(["Guten Tag"], "de")`.

    Raises:
        FileNotFoundError: There is no such folder, the folder is neither a run nor a
            SavedModel, or the run has no checkpoint yet.
        ValueError: A SavedModel is damaged or no translator, `beam_size` or `alpha`
            came for a SavedModel, or `path` is remote, `gs://` say.
        ImportError: A package of the extra `translation` is not installed.
    """
    folder = local_path(path, "path")
    if not folder.is_dir():
        raise FileNotFoundError(
            "`path` must be the folder of a run or of a SavedModel. Received: "
            f"path={str(path)!r}, which is {'a file' if folder.exists() else 'missing'}"
        )
    if (folder / "settings.json").is_file():
        options = {"beam_size": beam_size, "alpha": alpha}
        given = {name: value for name, value in options.items() if value is not None}
        return _load_run(folder, given)
    if not (folder / "saved_model.pb").is_file():
        found = sorted(entry.name for entry in folder.iterdir())[:8]
        raise FileNotFoundError(
            "`path` must be the folder of a run, which holds a settings.json, or of a "
            f"SavedModel, which holds a saved_model.pb. Received: path={str(path)!r}, "
            f"which holds {', '.join(found) or 'nothing'}"
        )
    if beam_size is not None or alpha is not None:
        raise ValueError(
            "`beam_size` and `alpha` must be left out for a SavedModel: its export "
            "decided them (gshard-translate export --beam-size). Received: "
            f"beam_size={beam_size}, alpha={alpha}, path={str(path)!r}"
        )
    return _load_saved_model(folder)


def _load_run(folder: Path, options: dict) -> LoadedTranslator:
    from gshard_examples.translation.decoding_choice import decoding_of
    from gshard_examples.translation.train import load_model
    from gshard_examples.translation.translator import Translator

    _, vocabulary, model = load_model(folder)
    search = dataclasses.asdict(decoding_of(folder, **options))
    translator = Translator(model, vocabulary, **search)
    return LoadedTranslator(
        folder,
        vocabulary.languages,
        lambda texts, tags: translator.translate(tags, texts),
    )


def _load_saved_model(folder: Path) -> LoadedTranslator:
    from gshard_examples.serving.model import Model
    from gshard_examples.translation.translator import by_length

    model = Model(folder)

    def translate(texts: list[str], tags: list[str]) -> list[str]:
        items = [
            (text.encode(), tag.encode(), False)
            for text, tag in zip(texts, tags, strict=True)
        ]
        return [found["text"] for found in model.translate(items)]

    return LoadedTranslator(
        folder,
        model.languages,
        lambda texts, tags: by_length(translate, texts, tags),
    )


def _strings(values: Sequence[str], name: str) -> list[str]:
    if isinstance(values, str | bytes):
        raise TypeError(f"`{name}` must be a list of strings. Received: {values!r:.80}")
    values = list(values)
    for value in values:
        if not isinstance(value, str):
            raise TypeError(
                f"`{name}` must be strings. Received: {value!r:.80}, of type "
                f"{type(value).__name__}"
            )
    return values
