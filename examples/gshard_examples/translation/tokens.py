"""A corpus split as ids: tokenized once, without padding, and cached."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gshard_examples.translation.corpus import Corpus, Pair
from gshard_examples.translation.vocabulary_training import BOS, EOS
from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.paths import local_path

if TYPE_CHECKING:
    import tensorflow as tf

    from gshard_examples.translation.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_CHUNK = 20_000  # strings per call of the tokenizer


@dataclass(frozen=True)
class TokenizedSplit:
    """A split as ids, without padding.

    Attributes:
        languages: The tags that occur, sorted.
        language: [n] index into `languages`, of each pair.
        source: Ids of all sources, one after the other: `[<lang>, ..., eos]`.
        source_starts: [n + 1] where each source starts in `source`.
        target: Ids of all targets: `[bos, ..., eos]`.
        target_starts: [n + 1] where each target starts in `target`.
    """

    languages: tuple[str, ...]
    language: np.ndarray
    source: np.ndarray
    source_starts: np.ndarray
    target: np.ndarray
    target_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.language)

    @property
    def source_lengths(self) -> np.ndarray:
        """[n] ids per source, tag and eos included."""
        return np.diff(self.source_starts)

    @property
    def target_lengths(self) -> np.ndarray:
        """[n] ids that the decoder predicts per target: pieces and eos, not bos."""
        return np.diff(self.target_starts) - 1

    def predicted_ids(self) -> np.ndarray:
        """Returns all ids that the decoder predicts, as one array: no bos."""
        return self.target[self.target != BOS]

    def cut(self, source_length: int, target_length: int) -> TokenizedSplit:
        """Returns the split with longer sentences cut; their eos is kept.

        Args:
            source_length: The most ids of a source, tag and eos included.
            target_length: The most ids that the decoder predicts of a target, eos
                included.
        """
        source, source_starts = _cut(self.source, self.source_starts, source_length)
        target, target_starts = _cut(self.target, self.target_starts, target_length + 1)
        return TokenizedSplit(
            self.languages, self.language, source, source_starts, target, target_starts
        )


def tokenize_pairs(pairs: Sequence[Pair], vocabulary: Vocabulary) -> TokenizedSplit:
    """Turns sentence pairs into ids.

    Raises:
        ValueError: A language is not in the vocabulary, or there are no pairs.
    """
    if not pairs:
        raise ValueError("there must be sentence pairs to tokenize. Received: 0 pairs")
    sources, targets = [], []
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        sources.append(
            vocabulary.encode_source([p.lang for p in chunk], [p.source for p in chunk])
        )
        targets.append(vocabulary.encode_target([p.english for p in chunk]))
    languages = tuple(sorted({pair.lang for pair in pairs}))
    index = {tag: number for number, tag in enumerate(languages)}
    source, source_starts = _joined(sources)
    target, target_starts = _joined(targets)
    return TokenizedSplit(
        languages,
        np.array([index[pair.lang] for pair in pairs], np.int32),
        source,
        source_starts,
        target,
        target_starts,
    )


def _joined(parts: list[tf.RaggedTensor]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate([part.flat_values.numpy() for part in parts])
    lengths = np.concatenate([part.row_lengths().numpy() for part in parts])
    return ids.astype(np.int32), np.concatenate([[0], np.cumsum(lengths)])


def _cut(
    ids: np.ndarray, starts: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.diff(starts)
    position = np.arange(len(ids)) - np.repeat(starts[:-1], lengths)
    kept = ids[position < most]
    kept_starts = np.concatenate([[0], np.cumsum(np.minimum(lengths, most))])
    kept[kept_starts[1:] - 1] = EOS
    return kept, kept_starts


def tokenize_split(
    corpus: Corpus,
    split: str,
    vocabulary: Vocabulary,
    languages: Sequence[str] | None = None,
    cache: str | Path | None = None,
) -> TokenizedSplit:
    """Turns a split of a corpus into ids, or takes them from a cache.

    Args:
        corpus: The corpus.
        split: One of `split.SPLITS`.
        vocabulary: The vocabulary; pairs in languages that it lacks are left out, and
            logged.
        languages: Keep only these language tags.
        cache: A folder for the ids (half a minute saved for a million pairs). The file
            is named by the contents of split and vocabulary, so it is never stale.

    Raises:
        ValueError: A language that was asked for is not in the vocabulary, or no pair
            is left.
    """
    if languages is not None:
        vocabulary.check_languages(list(languages))
    selected = set(vocabulary.languages if languages is None else languages)
    if cache is not None:
        name = " ".join([corpus.sha256(split), vocabulary.sha256, *sorted(selected)])
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        file = local_path(cache, "cache") / f"ids-{split}-{digest}.npz"
        if file.is_file():
            with np.load(file) as saved:
                tags = tuple(str(tag) for tag in saved["languages"])
                rest = {key: saved[key] for key in saved.files if key != "languages"}
            return TokenizedSplit(tags, **rest)
    pairs = corpus.read(split)
    kept = [pair for pair in pairs if pair.lang in selected]
    if languages is None and len(kept) < len(pairs):
        log.warning(
            "%s: %d pairs in languages without a vocabulary symbol are left out",
            split,
            len(pairs) - len(kept),
        )
    if not kept:
        raise ValueError(
            f"the split must have pairs in the languages. Received: split={split},"
            f" languages={sorted(selected)[:8]}"
        )
    tokens = tokenize_pairs(kept, vocabulary)
    if cache is not None:
        data = io.BytesIO()
        np.savez(data, **(vars(tokens) | {"languages": np.array(tokens.languages)}))
        write_file(file, data.getvalue())
    return tokens
