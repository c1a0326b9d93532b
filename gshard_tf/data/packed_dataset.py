"""`PackedDataset`: a `tf.data` dataset whose examples share rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from gshard_tf.data.rows import LOOKAHEAD, check_options, lay_out, plan_rows


class PackedDataset:
    """Batches of packed rows, of one shape, from a dataset of single examples.

    ```python
    examples = corpus.shuffle(10_000, seed=1).repeat()  # {"source": [n], "target": [m]}
    packed = gshard_tf.data.PackedDataset(
        examples, {"source": 96, "target": 64}, batch_size=32
    )
    data = gshard_tf.ResumableDataset(packed.dataset, position="count")
    model.fit(data.dataset.map(with_labels), ...)
    ```

    A batch is a dict with, for each feature, int rows `[batch_size, L]`, padded with 0,
    and int32 `"NAME_segment_ids"` of the same shape: 1, 2, ... in each row, 0 on
    padding. Example k of a row is segment k of each feature. A decoder's input and
    labels are features of their own: give both in each example, of equal lengths.

    Batch number `i` is a function of the examples, their order and `i` alone: the
    rows of each `lookahead` examples are packed by `plan_rows`, which keeps nothing for
    the next ones, and follow each other. So a run resumes exactly with
    `ResumableDataset(packed.dataset, position="count")`, which reads and packs what
    came before again and drops it. (`position="iterator"` is refused: TensorFlow does
    not save pipelines that call Python.) Rows that are left over when the examples end
    and fill no batch are dropped. With several processes, `shard` the examples
    before.

    Packing takes less time than TensorFlow takes to read the examples one by one;
    `prefetch` the batches to do both beside the step.

    Args:
        dataset: Dicts of vectors of ints, each with 1 id or more, for each feature; not
            batched. Other keys are not passed on.
        row_lengths: Feature -> L, the length of a row. Features fill alike when the row
            lengths have the ratio of the mean lengths.
        batch_size: B, rows of a batch.
        lookahead: The number of examples that are packed together; see `plan_rows`.
        too_long: "raise", or "drop", which counts in `too_long`.

    Attributes:
        dataset: The `tf.data.Dataset`.
        too_long: How many examples were dropped so far by all iterators over it, which
            may be ahead of the batches that were taken.

    Raises:
        ValueError: An option is wrong, or a feature is missing or no vector of ints.
        tf.errors.InvalidArgumentError: by the step that reads it, when an example has
            no ids of a feature, or is longer than a row and `too_long` is "raise".
    """

    def __init__(
        self,
        dataset: tf.data.Dataset,
        row_lengths: Mapping[str, int],
        batch_size: int,
        lookahead: int = LOOKAHEAD,
        too_long: str = "raise",
    ):
        sizes = list(row_lengths.values())
        limits = np.asarray(sizes)
        check_options(limits, lookahead, too_long)
        if batch_size < 1:
            raise ValueError(
                f"`batch_size` must be 1 or more. Received: batch_size={batch_size}"
            )
        spec = dataset.element_spec
        for name in row_lengths:
            feature = spec.get(name) if isinstance(spec, Mapping) else None
            if (
                not isinstance(feature, tf.TensorSpec)
                or feature.shape.rank != 1
                or not feature.dtype.is_integer
            ):
                raise ValueError(
                    "`dataset` must have dicts with a vector of integers for each of "
                    f"row_lengths. Received: {name}={feature}, of {spec}"
                )
        self.too_long = 0

        def pack(*ids_and_starts: np.ndarray) -> list[np.ndarray]:
            ids, ends = ids_and_starts[::2], ids_and_starts[1::2]
            lengths = np.stack([np.diff(end) for end in ends], axis=1)
            plan = plan_rows(lengths, sizes, lookahead, too_long)
            self.too_long += plan.too_long
            made: list[np.ndarray] = []
            for feature, values in enumerate(ids):
                made += lay_out(
                    plan,
                    values,
                    ends[feature][:-1],
                    lengths[:, feature],
                    int(limits[feature]),
                )
            return made

        def rows(examples: dict[str, Any]) -> dict[str, tf.Tensor]:
            arguments, dtypes = [], []
            for name in row_lengths:
                ids = examples[name]
                if isinstance(ids, tf.Tensor):  # all examples are of one length
                    ids = tf.RaggedTensor.from_tensor(ids)
                arguments += [ids.flat_values, ids.row_splits]
                dtypes += [ids.dtype, tf.int32]
            made = tf.numpy_function(pack, arguments, dtypes)
            packed: dict[str, Any] = {}
            for number, (name, length) in enumerate(row_lengths.items()):
                for key, array in (
                    (name, made[2 * number]),
                    (f"{name}_segment_ids", made[2 * number + 1]),
                ):
                    packed[key] = tf.ensure_shape(array, [None, length])
            return packed

        # One after the other: in order, and `too_long` is counted by one thread.
        examples = dataset.map(lambda example: {n: example[n] for n in row_lengths})
        packed = examples.ragged_batch(lookahead).map(rows)
        self.dataset = packed.unbatch().batch(batch_size, drop_remainder=True)
