"""Baselines that a translation model must be compared with.

* Copying the source earns points for placeholders, names and numbers.
* A translation memory, the English of the most similar training source, earns many
  points without any learning where test messages resemble training messages.
* A unigram model's cross-entropy is the loss of a decoder that has learned how often
  each subword occurs, and nothing else.
* Apertium is a rule-based translator, for the few pairs that it has.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gshard_examples.translation.corpus import Pair
from gshard_examples.translation.package_files import missing_packages


def copy_source(pairs: Sequence[Pair]) -> list[str]:
    """Returns the sources themselves as translations."""
    return [pair.source for pair in pairs]


class TranslationMemory:
    """Nearest neighbor: the English of the training source most like this one.

    Similar means cosine similarity of TF-IDF weights of the character 2-, 3- and
    4-grams, within the same language. Where nothing is similar at all (or the language
    has no training pair), the source is copied.

    Args:
        training: Training pairs.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """

    def __init__(self, training: Sequence[Pair]) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise missing_packages(
                ["scikit-learn"], "the translation memory needs it"
            ) from error
        self._vectorizer = TfidfVectorizer
        self._training: dict[str, list[Pair]] = defaultdict(list)
        for pair in training:
            self._training[pair.lang].append(pair)

    def translate(
        self,
        pairs: Sequence[Pair],
        progress: Callable[[str, int, int | None], None] | None = None,
    ) -> list[str]:
        """Translates the sources of `pairs`; their English is not looked at."""
        positions = defaultdict(list)
        for position, pair in enumerate(pairs):
            positions[pair.lang].append(position)
        translations = copy_source(pairs)
        for done, (tag, where) in enumerate(sorted(positions.items())):
            if progress:
                progress("translation memory", done, len(positions))
            memory = self._training.get(tag)
            if not memory:
                continue
            vectorizer = self._vectorizer(
                analyzer="char", ngram_range=(2, 4), dtype=np.float32
            )
            known = vectorizer.fit_transform(pair.source for pair in memory)
            asked = vectorizer.transform(pairs[i].source for i in where)
            # [test, training], sparse; the first of equals wins, as in the file.
            similarity = (asked @ known.T).tocsr()
            for row, position in enumerate(where):
                low, high = similarity.indptr[row : row + 2]
                if low == high:
                    continue
                values = similarity.data[low:high]
                columns = similarity.indices[low:high]
                best = columns[values >= values.max()].min()
                translations[position] = memory[best].english
        return translations


def unigram_cross_entropy(
    training_ids: np.ndarray,
    ids: np.ndarray,
    vocabulary_size: int,
    smoothing: float = 1.0,
) -> float:
    """Returns a unigram model's loss in nats per token.

    Args:
        training_ids: All ids that a decoder predicts in training (eos included), as
            from `tokens.TokenizedSplit.predicted_ids`.
        ids: The same of the split to measure on.
        vocabulary_size: Number of symbols.
        smoothing: Added to every symbol's count.

    Raises:
        ValueError: There are no ids to count or to measure, or `smoothing` is not
            positive, so that an unseen symbol would cost infinitely much.
    """
    if not smoothing > 0:
        raise ValueError(f"smoothing must be positive. Received: smoothing={smoothing}")
    if not len(training_ids) or not len(ids):
        raise ValueError(
            "there must be ids to count and to measure. Received: "
            f"{len(training_ids)} training ids, {len(ids)} ids"
        )
    counts = np.bincount(training_ids, minlength=vocabulary_size) + smoothing
    log_probability = np.log(counts) - np.log(counts.sum())
    return float(-log_probability[ids].mean())


#: Language tag -> Apertium's name of the pair into English.
APERTIUM_MODES = {
    "bs": "hbs-eng",
    "ca": "cat-eng",
    "eo": "eo-en",
    "es": "spa-eng",
    "eu": "eu-en",
    "gl": "gl-en",
    "hr": "hbs-eng",
    "is": "isl-eng",
    "mk": "mkd-eng",
    "sr_Latn": "hbs-eng",
}


@dataclass(frozen=True)
class ApertiumResult:
    """Apertium's translations of some pairs.

    Attributes:
        positions: Positions of the pairs that it translated.
        translations: Their translations.
        skipped: Language tag -> why its pairs were not translated.
    """

    positions: list[int]
    translations: list[str]
    skipped: dict[str, str] = field(default_factory=dict)


def translate_with_apertium(
    pairs: Sequence[Pair], timeout_s: float = 600.0
) -> ApertiumResult:
    """Translates the sources of the languages that Apertium has, where it is installed.

    Args:
        pairs: The pairs; the English is not looked at.
        timeout_s: Seconds that one language may take.

    Returns:
        The translations, and for every other language the reason.

    Raises:
        OSError: An installed Apertium fails, or takes too long.
    """
    positions = defaultdict(list)
    for position, pair in enumerate(pairs):
        positions[pair.lang].append(position)
    program = shutil.which("apertium")
    if program is None:
        reason = "the program apertium is not installed"
        return ApertiumResult([], [], dict.fromkeys(sorted(positions), reason))
    modes = set(_run([program, "-l"], "", timeout_s).split())
    result = ApertiumResult([], [])
    for tag in sorted(positions):
        mode = APERTIUM_MODES.get(tag)
        if mode is None:
            result.skipped[tag] = "Apertium has no pair into English"
            continue
        if mode not in modes:
            result.skipped[tag] = f"Apertium's pair {mode} is not installed"
            continue
        where = positions[tag]
        # An empty line ends a sentence. (With "-f line" no such trick is needed, but
        # it swallows the full stop at the end of each line.)
        text = "\n\n".join(pairs[position].source for position in where) + "\n"
        output = _run([program, "-u", "-f", "txt", mode], text, timeout_s)
        lines = output.removesuffix("\n").split("\n\n")
        if len(lines) != len(where):
            raise OSError(
                f"apertium {mode} gave {len(lines)} lines for {len(where)} texts"
            )
        result.positions.extend(where)
        result.translations.extend(line.strip() for line in lines)
    return result


def _run(command: list[str], text: str, timeout_s: float) -> str:
    try:
        done = subprocess.run(
            command,
            input=text.encode(),
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{' '.join(command)} took over {timeout_s:g} s") from error
    if done.returncode != 0:
        complaint = done.stderr.decode(errors="replace").strip()
        raise OSError(f"{' '.join(command)} failed: {complaint}")
    return done.stdout.decode("utf-8", errors="replace")
