"""Global batches, and the rows of them that each process has."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from gshard_tf.runtime.device_arrays import assemble
from gshard_tf.runtime.process_group import group
from gshard_tf.sharding.regions import Region, cut


def process_local_rows(batch: Any) -> Any:
    """Returns this process's rows of a batch.

    For `SpmdStrategy(process_local_batches=True)`:

    ```python
    dataset = dataset.batch(64).map(lambda x, y: gshard_tf.process_local_rows((x, y)))
    ```

    Args:
        batch: A nest of tensors `[B, ...]`.

    Returns:
        The same nest of `[B / count, ...]`: the rows that follow those of the process
        before.

    Raises:
        ValueError: when a known number of rows does not divide by the processes.
    """
    index, count = group().index, group().count

    def local(tensor: Any) -> Any:
        rows = tensor.shape[0]
        if rows is not None and rows % count:
            raise ValueError(
                "The rows of a batch must divide by the processes; batch with "
                f"drop_remainder=True. Received: {rows} rows for {count} processes"
            )
        rows = tf.shape(tensor)[0]
        even = tf.debugging.assert_equal(rows % count, 0, "rows that do not divide")
        with tf.control_dependencies([even] if even is not None else []):
            size = rows // count
        return tensor[index * size : (index + 1) * size]

    return tf.nest.map_structure(local, batch)


def assemble_batch(array: np.ndarray, shape: tuple[int, ...], sharding: Any) -> Any:
    """Returns a step's argument on the devices.

    Args:
        array: All of it, or this process's rows.
        shape: The whole shape.
        sharding: How the devices hold it.
    """
    import jax

    if array.shape == shape:
        return assemble(shape, sharding, lambda region: cut(array, region))
    if _is_fed(sharding, shape):
        offset = group().index * array.shape[0]

        def read(region: Region) -> np.ndarray:
            (first, count), *others = region
            return cut(array, ((first - offset, count), *others))

        return assemble(shape, sharding, read)
    # Devices need rows that another process feeds.
    fed = _rows_by_process(sharding)
    value = jax.make_array_from_process_local_data(fed, array, shape)
    return _copy_to(sharding)(value)


@functools.cache
def _is_fed(sharding: Any, shape: tuple[int, ...]) -> bool:
    """True when each process feeds the rows that its own devices need."""
    fed = _rows_by_process(sharding)
    theirs, wanted = (each.devices_indices_map(shape) for each in (fed, sharding))
    return all(
        _holds(theirs[device][0], wanted[device][0], shape[0]) for device in wanted
    )


@functools.cache
def _rows_by_process(sharding: Any) -> Any:
    """The sharding of rows of which each process feeds its own, over its devices."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    # Those of a process follow each other.
    devices = sharding.mesh.devices.reshape(group().count, -1)
    return NamedSharding(Mesh(devices, ("process", "device")), PartitionSpec("process"))


def _holds(rows: slice, others: slice, size: int) -> bool:
    """True when the first of two slices of `size` rows has all rows of the second."""
    start, stop, _ = others.indices(size)
    return rows.start <= start and stop <= rows.stop


@functools.cache
def _copy_to(sharding: Any) -> Callable[[Any], Any]:
    """A function that copies values between devices; all processes must call it."""
    import jax

    return jax.jit(lambda value: value, out_shardings=sharding)
