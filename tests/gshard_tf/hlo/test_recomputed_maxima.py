"""Gradients of maxima do not depend on how often their operand is computed."""

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from tensorflow.compiler.xla.service import hlo_pb2

from gshard_tf.hlo.rewrites.recomputed_maxima import compute_compared_maxima_once


def lowered(reduce, dtype=tf.float32):
    """The gradient of what `reduce` makes of a product, as TensorFlow lowers it."""

    @tf.function(jit_compile=True, autograph=False)
    def step(x, scale):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = reduce(x * scale)
        return tape.gradient(y, x)

    x = tf.ones([8, 6], dtype)
    hlo = step.experimental_get_compiler_ir(x, x)(stage="hlo_serialized")
    return hlo_pb2.HloModuleProto.FromString(hlo)


def barriers(module):
    return sum(
        i.opcode == "opt-barrier" for c in module.computations for i in c.instructions
    )


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
@pytest.mark.parametrize(
    "reduce",
    [
        tf.reduce_max,
        lambda x: tf.reduce_max(x, 1, keepdims=True),
        lambda x: tf.reduce_min(tf.transpose(x), 0),
        lambda x: tf.math.unsorted_segment_max(x, tf.range(8) % 3, 3),
        lambda x: tf.function(lambda x: tf.reduce_max(x, 0))(x),
    ],
)
def test_what_is_compared_with_its_maximum_is_held(reduce, dtype):
    module = lowered(reduce, dtype)
    assert compute_compared_maxima_once(module)
    assert barriers(module) == 1
    (held,) = (i for c in module.computations for i in c.instructions
               if i.opcode == "opt-barrier")  # fmt: skip
    ids = {i.id: i for c in module.computations for i in c.instructions}
    assert len(ids) == sum(len(c.instructions) for c in module.computations)
    assert ids[held.operand_ids[0]].opcode == "multiply"
    users = [i for i in ids.values() if held.operand_ids[0] in i.operand_ids]
    assert users == [held]


@pytest.mark.parametrize(
    "reduce",
    [tf.nn.softmax, tf.reduce_logsumexp, tf.reduce_sum, tf.nn.relu],
)
def test_other_maxima_are_left_alone(reduce):
    module = lowered(reduce)
    before = module.SerializeToString(deterministic=True)
    assert not compute_compared_maxima_once(module)
    assert module.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 8}, {"data": 2, "model": 2}])
def test_pooled_maxima_of_normalised_images(mesh):
    rng = np.random.default_rng(0)
    x = rng.normal(size=[8, 6, 6, 3]).astype("float32")
    y = rng.normal(size=[8, 2]).astype("float32")

    def make():
        model = keras.Sequential(
            [
                keras.layers.Input([6, 6, 3]),
                keras.layers.Conv2D(4, 3, use_bias=False),
                keras.layers.BatchNormalization(),
                keras.layers.GlobalMaxPooling2D(),
                keras.layers.Dense(2),
            ]
        )
        model.compile("sgd", "mse")
        return model

    def fit(model):
        return model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)

    _, meshed = parity.assert_equal_runs(make, fit, mesh)
    # What the CPU compiler promises: barriers last.
    (program,) = meshed.strategy.programs
    assert " opt-barrier(" in program.compiled.as_text()
