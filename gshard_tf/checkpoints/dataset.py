"""`ResumableDataset`: input whose position is saved and restored."""

from typing import Any

import tensorflow as tf

from gshard_tf.checkpoints.dataset_caches import require_caches
from gshard_tf.compat.tf_datasets import iterator_resource, operations_with_state

POSITIONS = ("iterator", "count")


class ResumableDataset:
    """A `tf.data` dataset that a resumed run continues where it was.

    ```python
    data = ResumableDataset(dataset.shuffle(1000, seed=1).repeat().batch(64))
    model.fit(data.dataset, steps_per_epoch=100, epochs=10,
              callbacks=[CheckpointCallback("run", dataset=data)])
    ```

    Args:
        dataset: Batches without end: `.repeat()` it. For a restart to be exact, its
            random operations need seeds.
        position: How the position is saved. `"iterator"`: TensorFlow's own state of
            the pipeline, with the buffers of shuffling and prefetching; a restart is
            immediate. `"count"`: the number of batches, which a restart reads and
            drops; for pipelines that TensorFlow cannot save (Python generators and
            functions, random operations within `map` or `interleave`), and for restarts
            on another number of processes. These pipelines must give the same batches
            each time.

    Attributes:
        dataset: The dataset for `fit`. There is one position: every iterator over it
            continues where the last one stopped.

    Raises:
        ValueError: when the dataset ends, or TensorFlow cannot save its iterator and
            that is how the position is to be saved.
        tf.errors.InvalidArgumentError: by the step that reads beyond the end, of a
            dataset of unknown length.
    """

    def __init__(self, dataset: tf.data.Dataset, position: str = "iterator"):
        if position not in POSITIONS:
            raise ValueError(
                f"`position` must be one of {POSITIONS}. Received: "
                f"position={position!r}"
            )
        if int(dataset.cardinality()) >= 0:
            raise ValueError(
                "`dataset` must be one without end, dataset.repeat(), with "
                "fit(steps_per_epoch=...). Received: a dataset of "
                f"{int(dataset.cardinality())} batches"
            )
        if position == "iterator":
            # Now, and not at the first checkpoint, hours later.
            operations = operations_with_state(dataset)
            if operations:
                raise _cannot_save(f"{operations} have a state outside of the dataset")
        self.position = position
        self._batches = dataset
        self._source = iter(dataset)
        # To restart from. (A new iterator would shuffle in another order.)
        try:
            self._beginning = self._serialized()
        except tf.errors.OpError:
            self._beginning = None
        self._batches_taken = tf.Variable(0, dtype=tf.int64, trainable=False)

        def take(_):
            batch = self._source.get_next_as_optional()
            # (An end of the source within a map is an error without a reason.)
            check = tf.debugging.Assert(
                batch.has_value(),
                [
                    "The dataset of ResumableDataset has ended. It must be one without "
                    "end, dataset.repeat(), of at least one batch. Batches received:",
                    self._batches_taken.read_value(),
                ],
            )
            with tf.control_dependencies([check]):
                self._batches_taken.assign_add(1)
                return batch.get_value()

        options = tf.data.Options()
        # Nothing may be read ahead of the step that uses it.
        options.experimental_optimization.inject_prefetch = False
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.OFF
        )
        self.dataset = tf.data.Dataset.counter().map(take).with_options(options)

    @property
    def batches_taken(self) -> int:
        """The number of batches that were read."""
        return int(self._batches_taken)

    def state(self) -> dict[str, Any]:
        """Returns the position, for a checkpoint: a count, and a tensor or None.

        Raises:
            ValueError: when TensorFlow cannot save this pipeline.
        """
        iterator = None
        if self.position == "iterator":
            try:
                iterator = self._serialized()
            except tf.errors.OpError as error:
                raise _cannot_save(f"TensorFlow's error: {error.message}") from error
        return {"batches": self.batches_taken, "iterator": iterator}

    def restore(self, batches: int, iterator: tf.Tensor | None) -> None:
        """Moves to a saved position.

        Args:
            batches: The number of batches that had been read.
            iterator: TensorFlow's state; None: read and drop that many batches.

        Raises:
            ValueError: when the state is that of another dataset, files of a
                `dataset.cache(FILE)` that it relies on are missing or not whole, the
                position is an earlier one and TensorFlow cannot restart, or the dataset
                ends before it.
        """
        if iterator is not None:
            try:
                self._deserialize(iterator)
            except tf.errors.OpError as error:
                raise ValueError(
                    "The input must be that of the checkpoint, and is another input "
                    f"pipeline. TensorFlow's error: {error.message}"
                ) from error
        else:
            if batches < self.batches_taken:
                if not self.restart():
                    raise ValueError(
                        "TensorFlow cannot restart this dataset, to move to an earlier "
                        "batch. Make it anew. Received: batch "
                        f"{batches}, after batch {self.batches_taken}"
                    )
            for batch in range(self.batches_taken, batches):
                try:
                    next(self._source)
                except StopIteration as error:
                    raise ValueError(
                        "The dataset must reach the position of the checkpoint, after "
                        f"{batches} batches. Received: a dataset of {batch} batches"
                    ) from error
        self._batches_taken.assign(batches)

    def require(self, iterator: tf.Tensor | None) -> None:
        """Raises the errors of `restore` for missing files, and does not move.

        Args:
            iterator: TensorFlow's state; None relies on no files.

        Raises:
            ValueError: when files of a `dataset.cache(FILE)` that the state relies on
                are missing or not whole, or have other elements.
        """
        if iterator is not None:
            require_caches(self._batches, iterator)

    def restart(self) -> bool:
        """Moves to the beginning, if TensorFlow can; returns whether it could.

        Raises:
            ValueError: as `require`.
        """
        if self._beginning is None:
            return False
        self._deserialize(self._beginning)
        self._batches_taken.assign(0)
        return True

    def _serialized(self) -> tf.Tensor:
        return tf.raw_ops.SerializeIterator(
            resource_handle=iterator_resource(self._source),
            external_state_policy=2,  # fail rather than forget something
        )

    def _deserialize(self, state: tf.Tensor) -> None:
        self.require(state)
        tf.raw_ops.DeserializeIterator(
            resource_handle=iterator_resource(self._source), serialized=state
        )


def _cannot_save(reason: str) -> ValueError:
    return ValueError(
        "TensorFlow cannot save the position in this dataset. Use "
        "ResumableDataset(..., position='count'), which reads and drops batches; or "
        "have no from_generator, tf.py_function or tf.numpy_function in it, "
        "tf.random.stateless_* in place of other random operations, and shuffle "
        f"outside of interleave and flat_map. {reason}"
    )
