"""Both of XLA's partitioners: Shardy, which all tests run with, and GSPMD.

`JAX_USE_SHARDY_PARTITIONER=0 pytest` runs all tests with GSPMD.
"""

import collections

import jax
import keras
import numpy as np
import parity
import pytest
from processes import run_python

import gshard_tf
from gshard_tf import export
from keras_layers import Conv2D, MoELayer, MultiHeadAttention

B, L, M = 8, 8, 16


@pytest.fixture
def use():
    """Chooses a partitioner for the rest of the test."""
    before = jax.config.jax_use_shardy_partitioner

    def choose(partitioner):
        jax.config.update("jax_use_shardy_partitioner", partitioner == "shardy")

    yield choose
    jax.config.update("jax_use_shardy_partitioner", before)


class Annotate(keras.layers.Layer):
    def __init__(self, *axes):
        super().__init__()
        self.axes = axes

    def call(self, x):
        return gshard_tf.annotate(x, self.axes)


def experts():
    """Experts behind attention, with dropout."""
    tokens = Annotate("batch", "length", None)
    yield from (tokens, MultiHeadAttention(4, 4), MoELayer(4, 32, dropout=0.1), tokens)


def ring():
    """Manual regions, with loops in them, in which parts go round."""
    tokens = Annotate("batch", "length", None)
    yield from (tokens, MultiHeadAttention(4, 4, context_parallel="ring"), tokens)


def images():
    """Manual regions of this package, and those that a rewrite makes."""
    yield Annotate("batch", "height", None, None)
    yield Conv2D(4, 3, dilation_rate=2, padding="same")
    yield keras.layers.DepthwiseConv2D(3, padding="same")


RULES = {"batch": "data", "group": "data", "expert": "data", "mlp": "model"}
LENGTH = {"batch": "data", "length": "length"}
HEIGHT = {"batch": "data", "height": "rows"}
CASES = {
    "experts": (experts, {"data": 4, "model": 2}, RULES, (B, L, M)),
    "ring": (ring, {"data": 2, "length": 4}, LENGTH, (B, L, M)),
    "images": (images, {"data": 2, "rows": 4}, HEIGHT, (B, 32, 8, 4)),
}


@pytest.mark.broad(3)
@pytest.mark.parametrize("case", ["ring", "experts", "images"])
def test_both_train_as_one_device_and_send_the_same(case, use):
    layers, mesh, rules, shape = CASES[case]
    x = np.random.default_rng(0).normal(size=shape).astype("float32")

    def make():
        y = inputs = keras.Input(shape[1:])
        for layer in layers():
            y = layer(y)
        model = keras.Model(inputs, keras.layers.Dense(1)(y))
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
        return model

    def fit(model):
        return model.fit(x, x.sum(-1, keepdims=True), batch_size=B, verbose=0)

    sent = {}
    for partitioner in ("shardy", "gspmd"):
        use(partitioner)
        _, meshed = parity.assert_equal_runs(
            make, fit, mesh, rules=gshard_tf.AxisRules(rules)
        )
        [program] = meshed.strategy.programs
        counts = collections.Counter()
        for each in program.collectives():
            counts[each.kind] += each.bytes * (each.times or 0)
        sent[partitioner] = counts
    assert sent["shardy"] == sent["gspmd"] and sent["shardy"]


@pytest.mark.slow
def test_saved_programs_keep_the_partitioner_that_they_were_saved_for(use, tmp_path):
    x, _ = parity.data(32)
    results = []
    for saved in ("shardy", "gspmd"):
        use(saved)
        keras.utils.set_random_seed(7)
        with parity.strategy_of(8).scope():
            model = parity.compiled()
        program = export.step_program(model, "predict", batch=x)
        program.save(tmp_path / saved, meshes=[8])
        export.save_state(model, tmp_path / "state.npz")
        state, _ = export.read_state(tmp_path / "state.npz")
        for loaded in ("shardy", "gspmd"):
            use(loaded)
            step = export.load(tmp_path / saved)
            assert step.compiled.as_text().count("all-to-all(") > 0
            [found] = step([x], step.put_state(state))[0].values()
            results.append(np.asarray(found))
    np.testing.assert_allclose(results, [model(x)] * 4, rtol=1e-5, atol=1e-6)


STEP = """
    import os, tempfile, warnings
    warnings.simplefilter("error")
    log = tempfile.TemporaryFile("w+")
    os.dup2(log.fileno(), 2)
    import gshard_tf, tensorflow as tf
    gshard_tf.request_cpu_devices(4)
    mesh = gshard_tf.create_mesh({"data": 4})
    strategy = gshard_tf.SpmdStrategy(mesh, gshard_tf.AxisRules({"rows": "data"}))
    step = tf.function(lambda x: tf.reduce_sum(gshard_tf.annotate(x, ("rows",))))
    assert float(strategy.run(step, args=(tf.ones([8]),))) == 8.0
    log.seek(0)
    print(log.read())
"""


@pytest.mark.slow
@pytest.mark.parametrize("shardy", ["1", "0"])
def test_the_log_of_a_step_says_nothing_of_shardy_unless_it_is_off(shardy):
    environ = {"JAX_USE_SHARDY_PARTITIONER": shardy, "TF_CPP_MIN_LOG_LEVEL": "0"}
    log = run_python(STEP, **environ)
    assert ("GSPMD sharding propagation is going to be" in log) == (shardy == "0")
    assert "Module has GSPMD attrs" not in log
