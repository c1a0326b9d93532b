"""Greedy translation as a program that jax alone runs, and its texts at home."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.experiment.design import Run, Size

#: The corpus's tests: new pairs of known messages, and new messages.
TESTS = ("test_pairs", "test")
#: B, Ls and the most ids of a translation. What is longer is cut.
ROWS, SOURCE, TARGET = 256, 64, 64


def tested_pairs(
    corpus: Any, name: str, size: Size, languages: Sequence[str]
) -> list[Any]:
    """Returns the pairs of a test that are translated, always the same ones."""
    from gshard_examples.translation.evaluate import choose

    return choose(corpus.read(name), size.per_language, languages, seed=0)


def whole_batches(tokens: Any) -> np.ndarray:
    """Returns the sources of a split, uint16 [n, Ls]: rows of eos fill up a batch."""
    from gshard_examples.translation.vocabulary_training import EOS

    tokens = tokens.cut(SOURCE, TARGET)
    rows = np.zeros((-(-len(tokens) // ROWS) * ROWS, SOURCE), np.uint16)
    rows[:, 0] = EOS
    at = np.arange(SOURCE) < tokens.source_lengths[:, np.newaxis]
    rows[: len(tokens)][at] = tokens.source
    return rows


def save_program(model: Any, path: pathlib.Path) -> None:
    """Writes the program that translates ids `[B, Ls]` to ids `[B, TARGET]`."""
    import tensorflow as tf

    from gshard_examples.translation.vocabulary import BOS, EOS, PAD
    from gshard_tf import export
    from keras_layers import greedy_decode, length_limits

    def predict_step(data: Any) -> dict[str, tf.Tensor]:
        source = data[0]["source"]
        limits = length_limits(source, PAD, 2.0, 10)
        ids, _ = greedy_decode(model, source, TARGET, BOS, EOS, limits)
        return {"ids": ids}

    # The state keeps its names, so that a trained one fits.
    model.predict_step = predict_step
    batch = ({"source": tf.TensorSpec((ROWS, SOURCE), tf.int32)},)
    export.step_program(model, "predict", batch).save(path)


def write_texts(
    corpus: Any, out: pathlib.Path, size: Size, languages: Sequence[str], run: Run
) -> None:
    """Writes the texts of translated ids where `score` finds them."""
    from gshard_examples.translation.vocabulary import Vocabulary

    vocabulary = Vocabulary(out / "vocab.model")
    for name in TESTS:
        count = len(tested_pairs(corpus, name, size, languages))
        ids = np.load(out / run.name / f"translated-{name}" / "ids.npy")[:count]
        found = vocabulary.decode(ids.astype(np.int32)).numpy()
        texts = [text.decode("utf-8", "replace") for text in found]
        (out / run.name / f"{name}.json").write_text(json.dumps(texts))
