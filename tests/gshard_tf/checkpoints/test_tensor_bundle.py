"""Arrays in slices: what is written is read back, whole and in parts."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from gshard_tf.checkpoints import tensor_bundle
from gshard_tf.sharding.regions import aligned_copies, whole


def _random(shape, dtype):
    values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    return aligned_copies([values])[0]


@pytest.mark.parametrize("dtype", ["float32", "int8", ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(70, 3), (1, 33, 5), (1, 1, 400), (7,), ()])
def test_slices_are_small_and_make_up_the_array(shape, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_bundle, "SLICE_BYTES", 128)
    value = _random(shape, dtype)
    slices = list(
        tensor_bundle._slices(tensor_bundle.ArrayShard("x", shape, whole(shape), value))
    )
    found = np.zeros(shape, dtype)
    for piece in slices:
        found[tuple(slice(a, a + n) for a, n in piece.region)] = piece.value
        assert np.shares_memory(piece.value, value)
        # Or the fewest rows that begin where TensorFlow takes memory as it is.
        assert piece.value.nbytes <= max(
            128, 64 * value.nbytes // max(shape, default=1)
        )
    np.testing.assert_array_equal(found, value)
    if value.nbytes > 1024:
        assert len(slices) > 1
    tensor_bundle.write(
        tmp_path / "state", [tensor_bundle.ArrayShard("x", shape, whole(shape), value)]
    )
    read = tensor_bundle.read(
        tmp_path / "state", "x", shape, whole(shape), tf.as_dtype(value.dtype)
    )
    np.testing.assert_array_equal(read.numpy(), value)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_part_of_an_array_that_two_devices_wrote(tmp_path_factory, data):
    rows, columns = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 40))
    value = _random((rows, columns), "float32")
    cut = data.draw(st.integers(1, rows - 1))
    regions = [((0, cut), (0, columns)), ((cut, rows - cut), (0, columns))]
    prefix = tmp_path_factory.mktemp("bundle") / "state"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_bundle, "SLICE_BYTES", data.draw(st.integers(64, 4096)))
        parts = aligned_copies([value[:cut], value[cut:]])
        tensor_bundle.write(
            prefix,
            [
                tensor_bundle.ArrayShard("x", value.shape, region, part)
                for region, part in zip(regions, parts, strict=True)
            ],
        )
    whole_of_it = tf.train.load_checkpoint(str(prefix)).get_tensor("x")
    np.testing.assert_array_equal(whole_of_it, value)
    begin = data.draw(st.integers(0, rows - 1))
    count = data.draw(st.integers(1, rows - begin))
    region = ((begin, count), (0, columns))
    read = tensor_bundle.read(prefix, "x", value.shape, region, tf.float32)
    np.testing.assert_array_equal(read, value[begin : begin + count])
