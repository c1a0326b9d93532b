"""Translations of a few dev sentences while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras

from gshard_examples.translation.corpus import Pair
from gshard_examples.translation.evaluate import choose
from gshard_examples.translation.translator import Translator
from gshard_examples.translation.vocabulary import Vocabulary

#: About so many times in a run, the last validation's among them.
TIMES = 5
#: Characters of a source: what fits on a line, and is decoded soon.
SHORT = (12, 60)


def sample_sentences(pairs: Sequence[Pair], count: int, seed: int = 0) -> list[Pair]:
    """Returns pairs of up to `count` languages, short ones, always the same."""
    short = [p for p in pairs if SHORT[0] <= len(p.source) <= SHORT[1]]
    one_each = choose(short, 1, None, seed)
    step = max(1, len(one_each) // max(count, 1))
    return one_each[::step][:count]


def is_due(step: int, steps: int, steps_per_epoch: int) -> bool:
    """Returns whether the validation after `step` is one of those with samples."""
    epoch, epochs = step // steps_per_epoch, steps // steps_per_epoch
    return (epochs - epoch) % max(1, -(-epochs // TIMES)) == 0


class Samples:
    """Translates the same sentences again and again, greedily.

    Args:
        model: What trains, on a mesh or not.
        plain: Makes a plain Keras model of the same settings, to which the weights are
            copied; None where `model` is one itself.
        vocabulary: Its vocabulary.
        pairs: The sentences.
    """

    def __init__(
        self,
        model: keras.Model,
        plain: Callable[[], keras.Model] | None,
        vocabulary: Vocabulary,
        pairs: Sequence[Pair],
    ):
        self._model, self._pairs = model, pairs
        self._copy = model if plain is None else plain()
        self._translator = Translator(self._copy, vocabulary, beam_size=1)

    def translate(self) -> list[tuple[str, str, str, str]]:
        """Returns language, source, translation and reference of each sentence."""
        if self._copy is not self._model:
            self._copy.set_weights(self._model.get_weights())
        texts = self._translator.translate(
            [p.lang for p in self._pairs], [p.source for p in self._pairs]
        )
        return [
            (p.lang, p.source, text, p.english)
            for p, text in zip(self._pairs, texts, strict=True)
        ]
