"""Annotations of DTensor values, in a process of their own: DTensor's device stays."""

import pytest
from processes import run_python

SETUP = """
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor
from tensorflow.dtensor.python import api
import gshard_tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 8,
)
plain = tf.ones([8])
assert gshard_tf.split(plain, 0, 8) is plain and gshard_tf.replicate(plain) is plain
# Asking must not make DTensor's device, which would stay.
print("devices before", 0 if api._dtensor_singleton is None else 1)

mesh = dtensor.create_mesh(
    [("data", 4), ("model", 2)], devices=[f"CPU:{i}" for i in range(8)]
)
values = np.arange(32, dtype="float32").reshape(8, 4)
x = dtensor.copy_to_mesh(values, dtensor.Layout.replicated(mesh, 2))

def specs(tensor):
    assert dtensor.is_dtensor(tensor)
    np.testing.assert_array_equal(
        dtensor.relayout(tensor, dtensor.Layout.replicated(mesh, 2)).numpy(), values
    )
    return dtensor.fetch_layout(tensor).sharding_specs

def refuses(call, *words):
    try:
        call()
    except ValueError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("nothing raised")
"""


@pytest.fixture(scope="module")
def printed():
    # One process for all: starting TensorFlow takes longer than the rest.
    return run_python(
        SETUP
        + """
print("shard", specs(gshard_tf.shard(x, dtensor.Layout(["data", "model"], mesh))))
print("split", specs(gshard_tf.split(x, 0, 4)), specs(gshard_tf.split(x, -1, 2)))
print("split1", specs(gshard_tf.split(gshard_tf.split(x, 0, 4), 0, 1)))
print("replicate", specs(gshard_tf.replicate(gshard_tf.split(x, 0, 4))))

rules = gshard_tf.AxisRules({"batch": "data", "mlp": "model"})
assert gshard_tf.annotate(x, ("batch", "mlp")) is x
with gshard_tf.use_mesh(gshard_tf.create_mesh({"data": 4, "model": 2}), rules):
    print("annotate", specs(gshard_tf.annotate(x, ("batch", "mlp"))))
    refuses(lambda: gshard_tf.annotate(x, ("batch",)), "2 of them")

refuses(lambda: gshard_tf.split(x, 0, 8), "exactly one axis", "num_partitions=8")
refuses(lambda: gshard_tf.split(x, 2, 4), "split_dimension=2")
refuses(lambda: gshard_tf.shard(x, np.arange(8).reshape(4, 2)), "dtensor.Layout")
with gshard_tf.use_mesh(gshard_tf.create_mesh({"batch": 8}), rules):
    refuses(lambda: gshard_tf.annotate(x, ("batch", None)), "{'batch': 8}", "'data': 4")

with tf.GradientTape() as tape:
    tape.watch(x)
    y = gshard_tf.split(x, 0, 4)
print("gradient", specs(tape.gradient(y, x, output_gradients=y)))
"""
    )


@pytest.mark.parametrize(
    "line",
    [
        "shard ['data', 'model']",
        "split ['data', 'unsharded'] ['unsharded', 'model']",
        "split1 ['unsharded', 'unsharded']",
        "replicate ['unsharded', 'unsharded']",
        "annotate ['data', 'model']",
        "gradient ['unsharded', 'unsharded']",
        "devices before 0",
    ],
)
def test_relays_a_dtensor_out(printed, line):
    assert line in printed.splitlines()
