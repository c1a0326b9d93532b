"""Splits of the corpus: an English message is held out for all languages at once.

A catalogue says the same English thing in a hundred languages, so a test set drawn by
*pair* would hold sentences whose English side the decoder has learned by heart from
other languages.  Here the unit is the normalized English message: all of its
translations fall on one side.  And because "Could not open {1}." with one word changed
is as good as seen, a held-out message close to a training message goes to a set of its
own, that is reported apart (`dev_near`, `test_near`).

What a translator of catalogues meets most is neither: a message that other languages
have already, new in this one.  So from what then trains, single *pairs* of a message
and a language are held out too (`dev_pairs`, `test_pairs`).
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

from gshard_examples.translation.languages import base_language

#: In the order in which they are written.
SPLITS = (
    "train",
    "dev",
    "test",
    "dev_near",
    "test_near",
    "dev_pairs",
    "test_pairs",
)
#: The splits of new pairs; the others are of new messages.
PAIR_SPLITS = ("dev_pairs", "test_pairs")

_PLACEHOLDER = re.compile(r"\{\d+\}")
_NOT_LETTERS = re.compile(r"[^a-z]+")
_NOT_WORDS = re.compile(r"[\W\d_]+")

#: Jaccard similarity of word sets from which a held-out message counts as a near-copy.
NEAR_COPY = 0.6
#: Messages in at least so many languages are held out at the full rate, others at a
#: sixth of it: so the languages are scored on much the same English.
WIDE = 40
#: Messages of fewer words always train: as a test they would measure a dictionary.
MIN_WORDS = 3
#: Share of a language's messages that are held out as new pairs for the test, and the
#: most of them; for `dev_pairs` half as many.
PAIR_SHARE, MOST_PAIRS = 0.1, 40
#: Languages with fewer messages that could be held out as new pairs keep all of them.
LEAST_MESSAGES = 100


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


def source_key(source: str) -> str:
    """Returns a source's lower-case words: what the translation memory finds again."""
    return _NOT_WORDS.sub(" ", source.casefold()).strip()


def _uniform(key: str) -> float:
    """A number in [0, 1) that depends on the message alone, on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def assign_splits(
    languages_of: Mapping[str, Iterable[str]],
    held_out: float,
    wide: int = WIDE,
    min_words: int = MIN_WORDS,
    near_copy: float | None = NEAR_COPY,
    held_splits: Collection[str] = ("dev", "test"),
) -> dict[str, str]:
    """Gives every message a split.

    Args:
        languages_of: Message key -> the languages that it is translated into.
        held_out: Share of the widely translated messages that go to `test`; half as
            many go to `dev`.  0.2 suits the small corpus, 0.06 the large ones.
        wide: See `WIDE`.
        min_words: See `MIN_WORDS`.
        near_copy: See `NEAR_COPY`. None: near-copies are not kept apart.
        held_splits: Which of `dev` and `test` to make. What would go to the other
            trains.

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
        held = "test" if draw < rate else "dev"
        trains = len(key.split()) < min_words or draw >= 1.5 * rate
        splits[key] = "train" if trains or held not in held_splits else held
    if near_copy is None:
        return splits
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


def choose_new_pairs(
    training: Iterable[tuple[str, str, str]],
    most: int = MOST_PAIRS,
    min_words: int = MIN_WORDS,
    least: int = LEAST_MESSAGES,
) -> dict[tuple[str, str], str]:
    """Chooses pairs of a language and a message that are new as a pair only.

    The language does not see the message in training, in no wording; another language
    does. (Two scripts of one language count as one.) And no training source of the
    language has the words of a held-out source, with another English.

    Args:
        training: (language tag, source, message key) of each training pair.
        most: The most messages that a language has in `test_pairs`. With 40, the mean
            over a hundred languages is of 4,000 pairs; one language's own score is
            good to some ten points only.
        min_words: See `MIN_WORDS`.
        least: See `LEAST_MESSAGES`.

    Returns:
        (language tag, message key) -> `"test_pairs"` or `"dev_pairs"`. It depends
        neither on the order of `training` nor on the machine.
    """
    # tag -> message key -> the keys of its sources
    sources: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    tags_of = defaultdict(set)  # message key -> the tags that train it
    for tag, source, key in training:
        sources[tag][key].add(source_key(source))
        tags_of[key].add(tag)
    held: dict[str, set[str]] = defaultdict(set)  # message key -> tags held out
    splits = {}
    for tag in sorted(sources):
        said = Counter(text for texts in sources[tag].values() for text in texts)
        able = [
            key
            for key, texts in sources[tag].items()
            if len(key.split()) >= min_words
            and all(said[text] == 1 for text in texts)
            and _known_elsewhere(tags_of[key], held[key] | {tag})
        ]
        if len(able) < least:
            continue
        test = min(most, int(PAIR_SHARE * len(able)))
        able.sort(key=lambda key: (_uniform(f"{tag}\t{key}"), key))
        for number, key in enumerate(able[: test + test // 2]):
            splits[tag, key] = "test_pairs" if number < test else "dev_pairs"
            held[key].add(tag)
    return splits


def _known_elsewhere(tags: set[str], held: set[str]) -> bool:
    """Says whether each language of `held` finds another one in what is left."""
    left = {base_language(tag) for tag in tags - held}
    return all(left - {base_language(tag)} for tag in held)
