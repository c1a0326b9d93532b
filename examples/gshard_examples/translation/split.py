"""Splits of the corpus: an English message is held out for all languages at once.

A catalogue says the same English thing in a hundred languages, so a test set drawn by
*pair* would hold sentences whose English side the decoder has learned by heart from
other languages.  Here the unit is the normalized English message: all of its
translations fall on one side.  And because "Could not open {1}." with one word changed
is as good as seen, a held-out message close to a training message goes to a set of its
own, that is reported apart (`dev_near`, `test_near`).
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

#: In the order in which they are written.
SPLITS = ("train", "dev", "test", "dev_near", "test_near")

_PLACEHOLDER = re.compile(r"\{\d+\}")
_NOT_LETTERS = re.compile(r"[^a-z]+")

#: Jaccard similarity of word sets from which a held-out message counts as a near-copy.
NEAR_COPY = 0.6
#: Messages in at least so many languages are held out at the full rate, others at a
#: sixth of it: so the languages are scored on much the same English.
WIDE = 40
#: Messages of fewer words always train: as a test they would measure a dictionary.
MIN_WORDS = 3


def message_key(english: str) -> str:
    """Returns what identifies an English message: its lower-case words.

    Placeholders, digits, punctuation, case and accents are dropped, so that "%d files",
    "%s Files." and "Files" are one message.
    """
    english = _PLACEHOLDER.sub(" ", english)
    if not english.isascii():
        english = "".join(
            c
            for c in unicodedata.normalize("NFKD", english)
            if not unicodedata.combining(c)
        )
    return _NOT_LETTERS.sub(" ", english.lower()).strip()


def _uniform(key: str) -> float:
    """A number in [0, 1) that depends on the message alone, on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def assign_splits(
    languages_of: Mapping[str, Iterable[str]],
    held_out: float,
    wide: int = WIDE,
    min_words: int = MIN_WORDS,
    near_copy: float = NEAR_COPY,
) -> dict[str, str]:
    """Gives every message a split.

    Args:
        languages_of: Message key -> the languages that it is translated into.
        held_out: Share of the widely translated messages that go to `test`; half as
            many go to `dev`.  0.2 suits the small corpus, 0.06 the large ones.
        wide: See `WIDE`.
        min_words: See `MIN_WORDS`.
        near_copy: See `NEAR_COPY`.

    Returns:
        Message key -> one of `SPLITS`.

    Raises:
        ValueError: `held_out` is outside [0, 0.6], where nothing would be left to
            train on.
    """
    if not 0.0 <= held_out <= 0.6:
        raise ValueError(
            "held_out is the share of messages to test on and must be between 0 and "
            f"0.6. Received: held_out={held_out}"
        )
    splits = {}
    for key, languages in languages_of.items():
        rate = held_out if len(set(languages)) >= wide else held_out / 6
        draw = _uniform(key)
        if len(key.split()) < min_words or draw >= 1.5 * rate:
            splits[key] = "train"
        else:
            splits[key] = "test" if draw < rate else "dev"
    training = [key for key, split in splits.items() if split == "train"]
    held_keys = [key for key, split in splits.items() if split != "train"]
    for key in near_copies(held_keys, training, near_copy):
        splits[key] += "_near"
    return splits


def near_copies(
    keys: Iterable[str], training: Iterable[str], threshold: float = NEAR_COPY
) -> set[str]:
    """Finds the messages of `keys` that nearly repeat a message of `training`.

    Args:
        keys: Message keys.
        training: Message keys.
        threshold: The least Jaccard similarity of the two word sets that counts.

    Returns:
        Those of `keys` with a near-copy in `training`; exact, not sampled.
    """
    training_sets = [frozenset(key.split()) for key in training]
    having = defaultdict(list)  # word -> the training sets that have it
    for index, words in enumerate(training_sets):
        for word in words:
            having[word].append(index)
    copies = set()
    for key in keys:
        words = frozenset(key.split())
        # |a & b| >= t |a | b| needs |a & b| >= t |a|: so b has at least one of any
        # |a| - ceil(t |a|) + 1 words of a.  We take the rarest ones.
        least = math.ceil(threshold * len(words) - 1e-9)
        rarest = sorted(words, key=lambda w: (len(having.get(w, ())), w))
        prefix = rarest[: len(words) - least + 1]
        candidates = Counter(i for word in prefix for i in having.get(word, ()))
        for index in candidates:
            other = training_sets[index]
            shared = len(words & other)
            if shared >= threshold * (len(words) + len(other) - shared) - 1e-9:
                copies.add(key)
                break
    return copies
