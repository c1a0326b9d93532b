"""Which array goes into which variable."""

import pytest

from gshard_tf.checkpoints.errors import CheckpointMismatchError
from gshard_tf.checkpoints.manifest import Array
from gshard_tf.checkpoints.matching import match


def array(*shape, dtype="float32"):
    return Array(shape, dtype, "", (None,) * len(shape))


def test_patterns_are_of_whole_names():
    targets = {"model/dense/kernel_scale": ((2,), "float32")}
    with pytest.raises(CheckpointMismatchError, match="not in the checkpoint"):
        match(targets, {}, missing=["model/dense/kernel"])
    found = match(targets, {}, missing=["model/dense/kernel.*"])
    assert found.missing == ("model/dense/kernel_scale",)


def test_another_type_is_a_mismatch():
    targets = {"model/a": ((2,), "bfloat16")}
    with pytest.raises(CheckpointMismatchError, match="model/a is bfloat16"):
        match(targets, {"model/a": array(2)})


def test_groups_of_a_pattern_are_put_into_the_name():
    targets = {f"model/block_{i}/kernel": ((2,), "float32") for i in range(3)}
    arrays = {f"model/old_{i}/w": array(2) for i in range(3)}
    found = match(
        targets, arrays, rename=[(r"model/block_(\d)/kernel", r"model/old_\1/w")]
    )
    assert found.sources == {
        f"model/block_{i}/kernel": f"model/old_{i}/w" for i in range(3)
    }
