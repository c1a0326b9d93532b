"""From a corpus split to batches: tokenizing once, sampling, bucketing, padding.

Two things decide the shape of this module.  XLA compiles a program per batch shape, so
there are only a few shapes, one per length bucket, and every batch has one of them
exactly.  And a training run that was interrupted must resume as if it had not been, so
the contents of batch number `i` are a pure function of `(seed, i)`: nothing is kept
in shuffle buffers, and `dataset(start_step=100_000)` reads nothing of what came before.

Therefore the batches are planned with NumPy, an epoch at a time, and `tf.data` only
transports them.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from gshard_examples.translation.corpus import Corpus, Pair
from gshard_examples.translation.vocabulary import (
    BOS,
    EOS,
    PAD,
    Vocabulary,
)
from gshard_examples.translation.vocabulary_training import temperature_shares
from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.paths import local_path

log = logging.getLogger(__name__)

#: Bucket lengths that suit catalogue messages, most of which are very short.
DEFAULT_BUCKETS = (8, 16, 32, 64)
#: Batch sizes are multiples of this, so that a batch divides over a mesh of 8.
BATCH_MULTIPLE = 8

_CHUNK = 20_000  # strings per call of the tokenizer


# ------------------------------------------------------------------------ tokenizing


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


# -------------------------------------------------------------------------- planning


class Batches:
    """The plan of all batches of a split.

    Source and target of a batch are padded to the same length, that of the smallest
    bucket in which both fit.

    Args:
        tokens: The split.
        batch_tokens: Source positions per batch, padding included: a bucket of length
            L has batches of about `batch_tokens / L` pairs, a multiple of
            `BATCH_MULTIPLE`. On a CPU 1,024 to 4,096 is comfortable; larger is steadier
            and, per token, faster.
        buckets: The lengths that batches may have, increasing. Each costs one
            compilation.
        training: Sample with a temperature, shuffle, drop what does not fit the last
            bucket and the few pairs that are left over per bucket and epoch.
            Otherwise: every pair once, too long ones cut, the last batch of each
            bucket filled up with rows of weight zero.
        temperature: See `vocabulary_training.temperature_shares`; in training only.
        shuffle: Whether training batches are in random order.
        seed: Decides sampling and order.

    Attributes:
        too_long: How many pairs do not fit the last bucket (dropped or cut).

    Raises:
        ValueError: An option is wrong, or no pair fits.
    """

    def __init__(
        self,
        tokens: TokenizedSplit,
        batch_tokens: int = 4096,
        buckets: Sequence[int] = DEFAULT_BUCKETS,
        training: bool = True,
        temperature: float = 5.0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 3:
            raise ValueError(
                "buckets must be increasing lengths of 3 or more. Received: "
                f"buckets={tuple(buckets)}"
            )
        if batch_tokens < BATCH_MULTIPLE:
            raise ValueError(
                f"batch_tokens must be {BATCH_MULTIPLE} or more. Received: "
                f"batch_tokens={batch_tokens}"
            )
        self.tokens = tokens
        self.buckets = tuple(int(length) for length in buckets)
        self.batch_sizes = tuple(
            max(1, round(batch_tokens / length / BATCH_MULTIPLE)) * BATCH_MULTIPLE
            for length in self.buckets
        )
        self.training = training
        self.shuffle = shuffle
        self.seed = seed
        lengths = np.maximum(tokens.source_lengths, tokens.target_lengths)
        fits = lengths <= self.buckets[-1]
        self.too_long = int(np.sum(~fits))
        # Too long ones count to the last bucket; in training they are not drawn.
        bucket = np.searchsorted(self.buckets, lengths)
        self._bucket = np.minimum(bucket, len(self.buckets) - 1)
        self._usable = np.flatnonzero(fits) if training else np.arange(len(tokens))
        if not len(self._usable):
            raise ValueError(
                f"no pair is as short as the longest bucket. Received: "
                f"buckets={self.buckets}"
            )
        if training:
            of = tokens.language[self._usable]
            self._members = {
                tokens.languages[i]: self._usable[of == i] for i in np.unique(of)
            }
            counts = {tag: len(rows) for tag, rows in self._members.items()}
            self.shares = temperature_shares(counts, temperature)
        self._last_plan: tuple[int, list[np.ndarray]] | None = None
        self._epoch_steps: list[int] = []
        if not self.plan(0):
            raise ValueError(
                "no bucket has enough pairs for one batch: lower batch_tokens. "
                f"Received: batch_tokens={batch_tokens}, pairs={len(self._usable)}"
            )

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """All (batch size, length) that occur: compile for these."""
        return list(zip(self.batch_sizes, self.buckets, strict=True))

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Returns the batches of an epoch, each as row numbers of the split.

        An epoch has as many pairs as the split has; with a temperature it has some of
        the large languages' pairs, others every epoch, and repeats the small ones'.
        """
        if self._last_plan is not None and self._last_plan[0] == epoch:
            return self._last_plan[1]
        generator = np.random.default_rng([self.seed, epoch])
        rows = self._sample(generator) if self.training else self._usable
        if self.training and self.shuffle:
            rows = generator.permutation(rows)
        bucket = self._bucket[rows]
        batches = []
        for number, size in enumerate(self.batch_sizes):
            inside = rows[bucket == number]
            whole = len(inside) - len(inside) % size if self.training else len(inside)
            batches += [inside[i : i + size] for i in range(0, whole, size)]
        if self.training and self.shuffle:
            batches = [batches[i] for i in generator.permutation(len(batches))]
        self._last_plan = (epoch, batches)
        return batches

    def _sample(self, generator: np.random.Generator) -> np.ndarray:
        total = len(self._usable)
        chosen = []
        for tag, members in self._members.items():
            exact = self.shares[tag] * total
            # Rounded at random, so that on average no language gets too little.
            count = int(exact) + int(generator.random() < exact % 1)
            repeats, rest = divmod(count, len(members))
            chosen.append(np.tile(members, repeats))
            chosen.append(generator.choice(members, rest, replace=False))
        return np.concatenate(chosen)

    def steps(self, epoch: int = 0) -> int:
        """Returns how many batches an epoch has; it differs a little by epoch."""
        if not self.training:
            return len(self.plan(0))
        while len(self._epoch_steps) <= epoch:
            self._epoch_steps.append(len(self.plan(len(self._epoch_steps))))
        return self._epoch_steps[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """Returns the (epoch, batch in that epoch) of a training step counted from 0.

        Raises:
            ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step must be 0 or more. Received: step={step}")
        epoch = 0
        while step >= self.steps(epoch):
            step -= self.steps(epoch)
            epoch += 1
        return epoch, step

    def batch(self, rows: np.ndarray):
        """Makes the batch of some rows, which are all of one bucket.

        Returns:
            `((source, target_in), target_out, sample_weight)`: int32 [B, L] each,
            and float32 [B, L], 0 on padding. Rows that only fill the batch up hold one
            eos (bos in `target_in`), so that no attention is over nothing.
        """
        number = int(self._bucket[rows].max())
        size, length = self.batch_sizes[number], self.buckets[number]
        tokens = self.tokens
        source = _padded(tokens.source, tokens.source_starts, rows, size, length)
        # One more, for the shift between what goes in and what must come out.
        target = _padded(tokens.target, tokens.target_starts, rows, size, length + 1)
        target_in, target_out = target[:, :-1].copy(), target[:, 1:].copy()
        # The last input of a target is eos, which predicts nothing.
        target_in[target_in == EOS] = PAD
        weight = (target_out != PAD).astype(np.float32)
        source[len(rows) :, 0] = EOS
        target_in[len(rows) :, 0] = BOS
        return (source, target_in), target_out, weight

    def __iter__(self) -> Iterator:
        """Yields batches: one pass, or for training without an end."""
        return self.from_step(0)

    def from_step(self, step: int) -> Iterator:
        """Yields batches from a step on, as if those before it had been yielded."""
        if not self.training:
            for rows in self.plan(0)[step:]:
                yield self.batch(rows)
            return
        first, offset = self.locate(step)
        for epoch in itertools.count(first):
            for rows in self.plan(epoch)[offset:]:
                yield self.batch(rows)
            offset = 0

    def rows(self) -> np.ndarray:
        """Returns the row numbers of an evaluation pass, in the batches' order."""
        return np.concatenate(self.plan(0))

    def dataset(self, start_step: int = 0) -> tf.data.Dataset:
        """Returns the batches as a `tf.data.Dataset`.

        A training dataset has no end (give `steps_per_epoch` to `fit`); an
        evaluation dataset knows its number of batches.

        Args:
            start_step: The first batch, counted over all epochs: the number of steps
                that an interrupted run has done.

        Returns:
            A dataset of `((source, target_in), target_out, sample_weight)`.
        """
        ids = tf.TensorSpec([None, None], tf.int32)
        weights = tf.TensorSpec([None, None], tf.float32)
        dataset = tf.data.Dataset.from_generator(
            lambda: self.from_step(start_step),
            output_signature=((ids, ids), ids, weights),
        )
        if not self.training:
            left = max(0, self.steps() - start_step)
            dataset = dataset.apply(tf.data.experimental.assert_cardinality(left))
        return dataset.prefetch(tf.data.AUTOTUNE)

    def summary(self) -> dict:
        """Returns what a log should say of the plan, as plain numbers."""
        plan = self.plan(0)
        shapes = Counter(int(self._bucket[rows].max()) for rows in plan)
        positions = sum(
            n * self.batch_sizes[b] * self.buckets[b] for b, n in shapes.items()
        )
        rows = np.concatenate(plan)
        last = self.buckets[-1]
        return {
            "pairs": len(self.tokens),
            "too_long": self.too_long,
            "steps": len(plan),
            "batches": {str(self.shapes[b]): shapes[b] for b in sorted(shapes)},
            "source_fill": float(
                np.minimum(self.tokens.source_lengths[rows], last).sum() / positions
            ),
            "target_fill": float(
                np.minimum(self.tokens.target_lengths[rows], last).sum() / positions
            ),
        }


def _padded(
    ids: np.ndarray, starts: np.ndarray, rows: np.ndarray, size: int, length: int
) -> np.ndarray:
    """Returns the given rows as int32 [size, length], cut (eos kept) and padded."""
    out = np.full((size, length), PAD, np.int32)
    lengths = starts[rows + 1] - starts[rows]
    kept = np.minimum(lengths, length)
    position = np.arange(length)
    valid = position < kept[:, np.newaxis]  # [rows, length]
    where = starts[rows][:, np.newaxis] + position
    out[: len(rows)][valid] = ids[where[valid]]
    cut = np.flatnonzero(lengths > length)
    out[cut, length - 1] = EOS
    return out


def make_dataset(
    corpus: Corpus,
    split: str,
    vocabulary: Vocabulary,
    batch_tokens: int = 4096,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    max_length: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    temperature: float = 5.0,
    training: bool = True,
    languages: Sequence[str] | None = None,
    cache: str | Path | None = None,
    start_step: int = 0,
) -> tf.data.Dataset:
    """Makes the dataset of a split in one call; see `tokenize_split` and `Batches`.

    Args:
        corpus: The corpus.
        split: One of `split.SPLITS`.
        vocabulary: The vocabulary.
        batch_tokens: Source positions per batch.
        buckets: The lengths that batches may have.
        max_length: Leave out the buckets above this, the last one being this.
        seed: Decides sampling and order.
        shuffle: Whether training batches are in random order.
        temperature: Of the sampling of languages, in training.
        training: Endless, sampled and shuffled; or one pass over everything.
        languages: Keep only these language tags.
        cache: A folder for the tokenized split.
        start_step: The step to start at.

    Returns:
        A dataset of `((source [B, L], target_in [B, L]), target_out [B, L],
        sample_weight [B, L])`.
    """
    if max_length is not None:
        buckets = (*(length for length in buckets if length < max_length), max_length)
    tokens = tokenize_split(corpus, split, vocabulary, languages, cache)
    return Batches(
        tokens, batch_tokens, buckets, training, temperature, shuffle, seed
    ).dataset(start_step)
