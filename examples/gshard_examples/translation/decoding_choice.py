"""The search of a run's translations: chosen on dev pairs, kept with the run.

A wider beam does not always translate better: a model that is unsure of its source
gives most probability to short and frequent sentences, and a better search finds them.
So `gshard-translate evaluate` tries a few beam sizes and length penalties on pairs of
the dev split, never of the test's, and `decoding.json` in the run's folder says which
was best. Translating and exporting take that one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gshard_examples.translation.corpus import Corpus, Pair
from gshard_examples.translation.evaluate import choose
from gshard_examples.translation.sampling import draw_pairs
from gshard_examples.translation.score import overall_chrf
from gshard_examples.translation.translator import CHUNK, Translator
from gshard_examples.translation.vocabulary import Vocabulary
from gshard_tf.io.atomic_files import write_file
from keras_layers.decoding import length_penalty

#: What is tried. Greedy search has one hypothesis, which no penalty ranks.
BEAM_SIZES = (1, 2, 4)
ALPHAS = (0.6, 0.8, 1.0, 1.2, 1.5)
#: Pairs of the dev split that are translated, once for each beam size.
PAIRS = 200
FILE = "decoding.json"


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A way to search for translations.

    Attributes:
        beam_size: K of `beam_search`; 1 is greedy.
        alpha: Exponent of its length penalty.
    """

    beam_size: int = 4
    alpha: float = 0.8

    def __str__(self) -> str:
        if self.beam_size == 1:
            return "greedy"
        return f"beam {self.beam_size}, alpha {self.alpha:g}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best of some ways to decode.

    Attributes:
        best: The way whose chrF is highest; of equals, the first of the grid, which is
            the fastest.
        chrf: chrF of each way on the dev pairs.
        pairs: The number of these.
    """

    best: Decoding
    chrf: dict[Decoding, float]
    pairs: int


def dev_pairs(
    corpus: Corpus, languages: Sequence[str], most: int = PAIRS, seed: int = 0
) -> list[Pair]:
    """Returns at most `most` dev pairs, of each language as many: always the same."""
    pairs = [p for p in corpus.read("dev") if p.lang in set(languages)]
    count = len({p.lang for p in pairs}) or 1
    even = choose(pairs, -(-most // count), None, seed)
    return draw_pairs(even, most, np.random.default_rng(seed))


def choose_decoding(
    model: keras.Model,
    vocabulary: Vocabulary,
    pairs: Sequence[Pair],
    beam_sizes: Sequence[int] = BEAM_SIZES,
    alphas: Sequence[float] = ALPHAS,
) -> Choice:
    """Translates pairs with each beam size, and ranks each beam by each penalty.

    Each beam size is one compiled program and one pass. Its hypotheses are those that
    the search with the middle of `alphas` ends with. The search with another `alpha`
    can end with others, where more than K hypotheses end by its last step; that is
    rare, and neglected here.

    Args:
        model: A plain Keras model, as `train.load_model` gives.
        vocabulary: Its vocabulary.
        pairs: What to score on, at least one; never what is tested on.
        beam_sizes: Increasing.
        alphas: Increasing, each at least 0.

    Returns:
        The best way, and the chrF of all.

    Raises:
        ValueError: There is no pair, or one in a language that is not known.
    """
    if not pairs:
        raise ValueError("there must be pairs to decide on. Received: 0 pairs")
    vocabulary.check_languages([pair.lang for pair in pairs])
    chrf = {}
    for beam_size in beam_sizes:
        tried = alphas if beam_size > 1 else [Decoding.alpha]
        middle = tried[len(tried) // 2]
        translator = Translator(model, vocabulary, beam_size=beam_size, alpha=middle)
        beams = _beams(translator, pairs)
        for alpha in tried:
            texts = [beam.best(alpha) for beam in beams]
            chrf[Decoding(beam_size, alpha)] = overall_chrf(pairs, texts)
    # The first of those with the most.
    best = max(chrf, key=lambda decoding: chrf[decoding])
    return Choice(best, chrf, len(pairs))


@dataclasses.dataclass(frozen=True)
class _Beam:
    """The hypotheses that one search ended with."""

    texts: list[bytes]
    log_probs: np.ndarray
    tokens: np.ndarray
    ended: np.ndarray

    def best(self, alpha: float) -> str:
        scores = self.log_probs / length_penalty(self.tokens, alpha).numpy()
        if self.ended.any():
            # As in the search: before any that was still growing at its limit.
            scores = np.where(self.ended, scores, -np.inf)
        return self.texts[int(np.argmax(scores))].decode("utf-8")


def _beams(translator: Translator, pairs: Sequence[Pair]) -> list[_Beam]:
    """The beam of each pair's source, those of like length searched together."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].source.encode()))
    beams: dict[int, _Beam] = {}
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK]
        found = translator.candidates(
            tf.constant([pairs[i].source for i in rows]),
            tf.constant([pairs[i].lang for i in rows]),
        )
        names = ("translations", "log_probs", "tokens", "ended")
        parts = [found[name].numpy() for name in names]
        for i, texts, *figures in zip(rows, *parts, strict=True):
            beams[i] = _Beam(list(texts), *figures)
    return [beams[i] for i in range(len(pairs))]


# ------------------------------------------------------------------ in a run's folder


def write_choice(run: Path, choice: Choice, step: int) -> None:
    """Writes a choice to a run's folder.

    Args:
        run: The folder.
        choice: The choice.
        step: The step of the checkpoint that it was made with.
    """
    record: dict[str, Any] = {
        **dataclasses.asdict(choice.best),
        "step": step,
        "split": "dev",
        "pairs": choice.pairs,
        "tried": [
            {**dataclasses.asdict(decoding), "chrf": chrf}
            for decoding, chrf in choice.chrf.items()
        ],
    }
    write_file(run / FILE, (json.dumps(record, indent=1) + "\n").encode())


def chosen_at(run: Path) -> int | None:
    """Returns the step of the checkpoint that a run's choice was made with, if any."""
    record = _read(run)
    return None if record is None else record["step"]


def decoding_of(
    run: Path, beam_size: int | None = None, alpha: float | None = None
) -> Decoding:
    """Returns how to search for a run's translations.

    Args:
        run: The run's folder.
        beam_size: Instead of the one that was chosen. None: that, or 4 where
            nothing has been chosen yet.
        alpha: The same; 0.8 where nothing has been chosen yet.
    """
    record = _read(run) or dataclasses.asdict(Decoding())
    return Decoding(
        record["beam_size"] if beam_size is None else beam_size,
        record["alpha"] if alpha is None else alpha,
    )


def _read(run: Path) -> dict[str, Any] | None:
    path = run / FILE
    return json.loads(path.read_text("utf-8")) if path.is_file() else None
