"""Partition specs: joined axes, and the parts that devices have."""

import numpy as np

from gshard_tf.layouts.partition_spec import as_jax, axes_of, join_axes, part_at


def test_joined_axes():
    assert join_axes(()) is None and axes_of(None) == ()
    for names in (("data",), ("model", "data")):
        assert axes_of(join_axes(names)) == names
    assert as_jax(("model+data", None, "data")) == (("model", "data"), None, "data")


def test_part_of_each_device():
    # numpy's own order of several indices: the last one is the fastest.
    sizes = {"a": 2, "b": 3, "c": 2}
    for index in np.ndindex(*sizes.values()):
        at = dict(zip(sizes, index, strict=True))
        for names in (("a", "b"), ("c", "a"), ("b", "c", "a"), ("b",)):
            expected = np.ravel_multi_index(
                [at[name] for name in names], [sizes[name] for name in names]
            )
            assert part_at("+".join(names), at, sizes) == expected
    assert part_at(None, {"a": 1}, {"a": 2}) == 0
