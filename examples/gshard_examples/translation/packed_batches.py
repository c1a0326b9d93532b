"""From a tokenized split to batches of packed rows, all of one shape.

Two things decide the shape of this module. XLA compiles a program per batch shape, so
there is one shape, in training and in validation, and its rows are full: each holds
several sentence pairs, told apart by segment ids. And a training run that was
interrupted must resume as if it had not been, so the contents of batch number `i` are a
pure function of `(seed, i)`: nothing is kept in shuffle buffers, and
`dataset(start_step=100_000)` makes no batch that came before.

Therefore the batches are planned with NumPy, an epoch at a time, and `tf.data` only
transports them. Without TensorFlow all but `batch_spec` and `dataset` is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from gshard_examples.translation.sampling import LanguageSampler
from gshard_examples.translation.tokens import TokenizedSplit
from gshard_examples.translation.vocabulary_training import BOS, EOS, PAD, UNK
from gshard_tf.data import LOOKAHEAD, RowPlan, lay_out, plan_rows

if TYPE_CHECKING:
    import tensorflow as tf

#: Batch sizes are multiples of this, so that a batch divides over a mesh of 8.
BATCH_MULTIPLE = 8
#: Row lengths of sources that `choose_row_lengths` chooses from.
SOURCE_LENGTHS = (64, 128, 256, 512)


def choose_row_lengths(
    tokens: TokenizedSplit, temperature: float = 5.0
) -> tuple[int, int]:
    """Returns row lengths of source and target that fill alike.

    The source's is the smallest of `SOURCE_LENGTHS` in which 95% of the pairs that are
    drawn fit (or else the longest), the target's that times the mean ratio of their
    lengths.

    Args:
        tokens: The split to train on.
        temperature: That of sampling.
    """
    everything = LanguageSampler(tokens, np.arange(len(tokens)), temperature)
    for source in SOURCE_LENGTHS:
        fits = tokens.source_lengths <= source
        target = 0
        if fits.any():
            # Twice: what is too long for the target's row is not drawn either.
            target = _target_length(tokens, fits, source, temperature)
            fits &= tokens.target_lengths <= target
        if fits.any():
            target = _target_length(tokens, fits, source, temperature)
            fits &= tokens.target_lengths <= target
        if everything.mean(fits) >= 0.95:
            break
    return source, max(target, 3)


def _target_length(
    tokens: TokenizedSplit, fits: np.ndarray, source: int, temperature: float
) -> int:
    drawn = LanguageSampler(tokens, np.flatnonzero(fits), temperature)
    return round(
        source * drawn.mean(tokens.target_lengths) / drawn.mean(tokens.source_lengths)
    )


def batch_shapes(
    row_lengths: tuple[int, int], batch_tokens: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns ((B, Ls), (B, Lt)): about `batch_tokens` source positions.

    Raises:
        ValueError: A length is below 3, or `batch_tokens` below `BATCH_MULTIPLE`.
    """
    if len(row_lengths) != 2 or min(row_lengths) < 3:
        raise ValueError(
            "row_lengths must be those of source and target, 3 or more. Received: "
            f"row_lengths={row_lengths}"
        )
    if batch_tokens < BATCH_MULTIPLE:
        raise ValueError(
            f"batch_tokens must be {BATCH_MULTIPLE} or more. Received: "
            f"batch_tokens={batch_tokens}"
        )
    source, target = row_lengths
    size = max(1, round(batch_tokens / source / BATCH_MULTIPLE)) * BATCH_MULTIPLE
    return (size, source), (size, target)


def batch_spec(row_lengths: tuple[int, int], batch_tokens: int):
    """Returns the specs of every batch, as `PackedBatches.batch` makes them."""
    import tensorflow as tf

    source, target = (
        tf.TensorSpec(shape, tf.int32)
        for shape in batch_shapes(row_lengths, batch_tokens)
    )
    inputs = {
        "source": source,
        "source_segment_ids": source,
        "target": target,
        "target_segment_ids": target,
    }
    return inputs, target, tf.TensorSpec(target.shape, tf.float32)


class PackedBatches:
    """The plan of all batches of a split.

    Args:
        tokens: The split.
        row_lengths: (Ls, Lt), positions of a row of sources and of targets, 3 or more;
            `choose_row_lengths` has a good choice.
        batch_tokens: Source positions per batch: it has about `batch_tokens / Ls` rows,
            a multiple of `BATCH_MULTIPLE`. On a CPU 1,024 to 4,096 is comfortable;
            larger is steadier and, per token, faster.
        training: Sample with a temperature, shuffle, drop what does not fit a row
            and the few rows that are left over in an epoch. Otherwise: every pair once,
            too long ones cut, the last batch filled up with rows of weight zero.
        temperature: See `temperature.temperature_shares`; in training only.
        seed: Decides sampling and order.
        lookahead: Of `gshard_tf.data.plan_rows`.
        word_dropout: Share of the ids that the model reads as "unknown", in training
            only: on both sides, but for tags and bos. It predicts all of them.

    Attributes:
        shapes: ((B, Ls), (B, Lt)), of every batch.
        too_long: How many pairs do not fit a row (dropped or cut).

    Raises:
        ValueError: An option is wrong, no pair fits, or there are not enough for a
            batch.
    """

    def __init__(
        self,
        tokens: TokenizedSplit,
        row_lengths: tuple[int, int],
        batch_tokens: int = 2048,
        training: bool = True,
        temperature: float = 5.0,
        seed: int = 0,
        lookahead: int = LOOKAHEAD,
        word_dropout: float = 0.0,
    ) -> None:
        self.shapes = batch_shapes(row_lengths, batch_tokens)
        (size, source), (_, target) = self.shapes
        self.batch_size = size
        self._batch_tokens = batch_tokens
        self.row_lengths = (source, target)
        self.training = training
        self.seed = seed
        self.lookahead = lookahead
        self.word_dropout = word_dropout if training else 0.0
        lengths = np.stack([tokens.source_lengths, tokens.target_lengths], axis=1)
        fits = (lengths <= row_lengths).all(axis=1)
        self.too_long = int(np.sum(~fits))
        if training:
            if not fits.any():
                raise ValueError(
                    "no pair is as short as a row. Received: "
                    f"row_lengths={self.row_lengths}, pairs={len(tokens)}"
                )
            self._sampler = LanguageSampler(tokens, np.flatnonzero(fits), temperature)
        self.tokens = tokens if training else tokens.cut(source, target)
        self._lengths = np.minimum(lengths, row_lengths)
        self._last_plan: tuple[int, RowPlan] | None = None
        self._epoch_steps: list[int] = []
        if not self.steps():
            raise ValueError(
                "there must be pairs for one batch: lower batch_tokens. Received: "
                f"batch_tokens={batch_tokens}, rows={len(self._pack(0))}, rows of a "
                f"batch={size}"
            )

    def plan(self, epoch: int = 0) -> RowPlan:
        """Returns the rows of an epoch, each as numbers of pairs of the split.

        In training they are whole batches.
        """
        if self._last_plan is None or self._last_plan[0] != epoch:
            rows = self._pack(epoch)
            if self.training:
                # Not the generator of the sample: its state is that of all draws.
                generator = np.random.default_rng([self.seed, epoch, 1])
                whole = len(rows) - len(rows) % self.batch_size
                rows = rows.select(generator.permutation(len(rows))[:whole])
            self._last_plan = (epoch, rows)
        return self._last_plan[1]

    def _pack(self, epoch: int) -> RowPlan:
        if self.training:
            pairs = self._sampler.draw(np.random.default_rng([self.seed, epoch]))
        else:
            pairs = np.arange(len(self.tokens))
        rows = plan_rows(self._lengths[pairs], self.row_lengths, self.lookahead)
        return RowPlan(pairs[rows.examples], rows.starts)

    def steps(self, epoch: int = 0) -> int:
        """Returns how many batches an epoch has; it differs a little by epoch."""
        if not self.training:
            return -(-len(self.plan()) // self.batch_size)
        while len(self._epoch_steps) <= epoch:
            rows = len(self.plan(len(self._epoch_steps)))
            self._epoch_steps.append(rows // self.batch_size)
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

    def batch(self, epoch: int, number: int):
        """Makes one batch of an epoch.

        Returns:
            `(inputs, target_out, sample_weight)`, where `inputs` has `"source"` and
            `"source_segment_ids"` int32 [B, Ls], and `"target"` (bos first) and
            `"target_segment_ids"` int32 [B, Lt]. `target_out` is int32 [B, Lt],
            `sample_weight` float32 [B, Lt], 0 on padding. Rows that only fill the batch
            up hold one eos (bos in the target), so that no attention is over nothing.
        """
        rows = self.plan(epoch)
        start = number * self.batch_size
        stop = min(start + self.batch_size, len(rows))
        rows = rows.select(np.arange(start, stop))
        tokens = self.tokens
        source_length, target_length = self.row_lengths
        source, source_segments = lay_out(
            rows,
            tokens.source,
            tokens.source_starts[:-1],
            tokens.source_lengths,
            source_length,
            PAD,
        )
        # The decoder reads all but the last id of a target, eos, and predicts all but
        # the first one, bos.
        starts, lengths = tokens.target_starts[:-1], tokens.target_lengths
        target, target_segments = lay_out(
            rows, tokens.target, starts, lengths, target_length, PAD
        )
        target_out, _ = lay_out(
            rows, tokens.target, starts + 1, lengths, target_length, PAD
        )
        if self.word_dropout:
            generator = np.random.default_rng([self.seed, epoch, number, 2])
            self._drop_words(source, source_segments, generator)
            self._drop_words(target, target_segments, generator)
        inputs = {
            "source": self._filled_up(source, EOS),
            "source_segment_ids": self._filled_up(source_segments, 1),
            "target": self._filled_up(target, BOS),
            "target_segment_ids": self._filled_up(target_segments, 1),
        }
        target_out = self._filled_up(target_out, PAD)
        return inputs, target_out, (target_out != PAD).astype(np.float32)

    def _drop_words(
        self, ids: np.ndarray, segments: np.ndarray, generator: np.random.Generator
    ) -> None:
        """Replaces ids [r, L] in place: words alone, no tag (a source's first id)."""
        first = np.diff(segments, axis=1, prepend=0) != 0
        dropped = generator.random(ids.shape) < self.word_dropout
        ids[dropped & ~first & (ids > EOS)] = UNK

    def _filled_up(self, rows: np.ndarray, first: int) -> np.ndarray:
        """Returns [r, L] as [B, L]: rows of one id, `first`, and padding are added."""
        more = self.batch_size - len(rows)
        rows = np.pad(rows, [(0, more), (0, 0)], constant_values=PAD)
        rows[self.batch_size - more :, 0] = first
        return rows

    def __iter__(self) -> Iterator:
        """Yields batches: one pass, or for training without an end."""
        return self.from_step(0)

    def from_step(self, step: int) -> Iterator:
        """Yields batches from a step on, as if those before it had been yielded."""
        first, offset = self.locate(step) if self.training else (0, step)
        for epoch in itertools.count(first) if self.training else [0]:
            for number in range(offset, self.steps(epoch)):
                yield self.batch(epoch, number)
            offset = 0

    def dataset(self, start_step: int = 0) -> tf.data.Dataset:
        """Returns the batches as a `tf.data.Dataset`.

        A training dataset has no end (give `steps_per_epoch` to `fit`); an
        evaluation dataset knows its number of batches.

        Args:
            start_step: The first batch, counted over all epochs: the number of steps
                that an interrupted run has done.

        Returns:
            A dataset of what `batch` returns.
        """
        import tensorflow as tf

        dataset = tf.data.Dataset.from_generator(
            lambda: self.from_step(start_step),
            output_signature=batch_spec(self.row_lengths, self._batch_tokens),
        )
        if not self.training:
            left = max(0, self.steps() - start_step)
            dataset = dataset.apply(tf.data.experimental.assert_cardinality(left))
        return dataset.prefetch(tf.data.AUTOTUNE)

    def summary(self) -> dict:
        """Returns what a log should say of the plan, as plain numbers."""
        rows = self.plan()
        in_batches = len(rows) / (self.steps() * self.batch_size)
        source, target = rows.fill(self._lengths, self.row_lengths) * in_batches
        return {
            "pairs": len(self.tokens),
            "too_long": self.too_long,
            "steps": self.steps(),
            "rows": self.batch_size,
            "row_lengths": self.row_lengths,
            "source_fill": float(source),
            "target_fill": float(target),
        }
