"""Variables that exist only as their shards: the same numbers, and no host copy."""

import functools
import gc

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.sharding import initial_value
from gshard_tf.spmd import resources

X, Y = parity.data(36)
FIT = {"batch_size": 12, "epochs": 3, "shuffle": False, "verbose": 0}
NONE = {"host_copy_bytes": 0}


def assert_no_host_copy(model):
    on_devices = 0
    for variable in [*model.variables, *model.optimizer.variables]:
        if variable.value.device_copy is not None:  # a step has used it
            assert elements_on_host(variable) == 0, variable.path
            on_devices += 1
    assert on_devices >= 4 + len(model.optimizer.variables)


def elements_on_host(variable):
    """How many elements the resource holds."""
    value = variable.value
    return tf.size(
        tf.raw_ops.ReadVariableOp(resource=value._resource, dtype=value.dtype)
    )


@functools.cache
def plain(optimizer):
    return parity.run_plain(
        lambda: parity.compiled(optimizer), lambda m: m.fit(X, Y, **FIT)
    )


def fit_without_copies(model):
    history = model.fit(X, Y, **FIT)
    assert_no_host_copy(model)
    return history


@pytest.mark.parametrize("mesh", [1, 8, {"data": 4, "model": 2}])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_is_plain_keras(monkeypatch, optimizer, mesh):
    monkeypatch.setattr(initial_value, "WHOLE_BYTES", 0)
    expected = plain(optimizer)
    make = functools.partial(parity.compiled, optimizer)
    found = parity.run_on_mesh(make, fit_without_copies, mesh, **NONE)
    parity.assert_close(found.result, expected.result, parity.RTOL, "history")
    parity.assert_same_state(found.model, expected.model)
    # They were read for that, and are not kept.
    assert_no_host_copy(found.model)


def use_everything(model):
    """Evaluation, callbacks, weights in and out, and several steps an execution."""
    stop = keras.callbacks.EarlyStopping(
        monitor="loss", mode="max", patience=0, restore_best_weights=True
    )
    found = [model.fit(X, Y, callbacks=[stop], **FIT).history]
    found += [model.evaluate(X, Y, verbose=0), model.predict(X, verbose=0)]
    weights = model.get_weights()
    model.set_weights([0.5 * w for w in weights])
    found.append(model.train_on_batch(X[:12], Y[:12]))
    model.steps_per_execution = 2
    model.make_train_function(force=True)
    found.append(model.fit(X, Y, **FIT).history)
    return [*found, weights, model.get_weights()]


def test_the_rest_is_plain_keras_too():
    _, meshed = parity.assert_equal_runs(parity.compiled, use_everything, **NONE)
    assert_no_host_copy(meshed.model)


def test_a_loop_of_ones_own():
    def use(model):
        strategy = model.distribute_strategy
        loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = loss_of(y, model(x, training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply(gradients, model.trainable_variables)
            return loss

        with strategy.scope():
            model.optimizer.build(model.trainable_variables)
        return [
            float(strategy.run(step, args=(X[i : i + 12], Y[i : i + 12])))
            for i in (0, 12, 24, 0)
        ]

    _, meshed = parity.assert_equal_runs(parity.compiled, use, **NONE)
    assert_no_host_copy(meshed.model)


INITIALIZERS = {
    "glorot_uniform": "glorot_uniform",
    "he_normal": "he_normal",
    "truncated": keras.initializers.TruncatedNormal(stddev=0.5),
    "orthogonal": "orthogonal",
    "generator": lambda: keras.initializers.GlorotUniform(
        seed=keras.random.SeedGenerator(5)
    ),
    "constant": keras.initializers.Constant(2.5),
    "numpy": lambda: lambda shape, dtype=None: np.random.normal(size=shape),
}


@pytest.mark.parametrize("name", INITIALIZERS)
def test_first_values_are_plain_keras(monkeypatch, name):
    monkeypatch.setattr(initial_value, "WHOLE_BYTES", 0)

    def weights():
        keras.utils.set_random_seed(3)
        initializer = INITIALIZERS[name]
        if callable(initializer) and name in ("generator", "numpy"):
            initializer = initializer()
        layers = [
            keras.layers.Dense(16, kernel_initializer=initializer, name=f"layer_{i}")
            for i in range(2)
        ]
        for layer in layers:
            layer.build([None, 24])
        return [layer.kernel for layer in layers]

    expected = [weight.numpy() for weight in weights()]
    paths = [(r"layer_\d/kernel", (None, "expert"))]
    rules = gshard_tf.AxisRules({"expert": "expert"}, paths=paths)
    strategy = parity.strategy_of(8, rules=rules, **NONE)
    with strategy.scope():
        found = weights()
    for before_step in (True, False):
        for weight, value in zip(found, expected, strict=True):
            np.testing.assert_array_equal(weight.numpy(), value)
        if before_step:
            strategy.run(tf.function(lambda: found[0] + found[1]))
    for weight in found:
        assert weight.value.device_copy.sharding.shard_shape((24, 16)) == (24, 2)
        assert elements_on_host(weight) == 0


def test_the_whole_is_never_made(monkeypatch):
    monkeypatch.setattr(initial_value, "WHOLE_BYTES", 0)

    def make():
        layers = [keras.layers.Input([8, 4]), parity.Experts(width=64)]
        model = keras.Sequential(layers)
        model.compile("adam", "mse")
        return model

    expected = parity.run_plain(make, lambda m: m.fit(X, X, **FIT).history)
    whole = initial_value.InitialValue.whole

    def forbidden(self):
        # (Of fewer zeros TensorFlow makes a constant.)
        assert self.shape.num_elements() < 1000, f"all of {self.shape} was computed"
        return whole(self)

    monkeypatch.setattr(initial_value.InitialValue, "whole", forbidden)
    found = parity.run_on_mesh(make, lambda m: m.fit(X, X, **FIT).history, **NONE)
    parity.assert_close(found.result, expected.result, parity.RTOL, "history")
    parity.assert_same_state(found.model, expected.model)
    assert found.model.layers[0].wi.value.is_large


def test_a_layer_may_assign_before_it_names_the_axes():
    class Layer(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(8, 4))
            self.w.assign(np.arange(32.0).reshape(8, 4))
            gshard_tf.name_axes(self.w, ("expert", None))

    strategy = parity.strategy_of(8, **NONE)
    with strategy.scope():
        layer = Layer()
        layer.build([1])
    layer.w.assign(layer.w + 1.0)
    np.testing.assert_array_equal(layer.w, np.arange(32.0).reshape(8, 4) + 1)
    assert layer.w.value.device_copy.sharding.shard_shape((8, 4)) == (1, 4)


def test_files_of_keras_there_and_back(tmp_path):
    trained = parity.run_on_mesh(
        parity.compiled, lambda m: m.fit(X, Y, **FIT), **NONE
    ).model
    trained.save(tmp_path / "model.keras")
    trained.save_weights(tmp_path / "model.weights.h5")
    with parity.strategy_of({"data": 4, "model": 2}, **NONE).scope():
        loaded = keras.models.load_model(
            tmp_path / "model.keras", {"Experts": parity.Experts}
        )
    parity.assert_same_saved(loaded, trained)
    # What was read went to the devices at once.
    assert elements_on_host(loaded.layers[0].wi) == 0
    loaded.fit(X, Y, **FIT)
    loaded.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(loaded.layers[0].wi, trained.layers[0].wi)
    assert_no_host_copy(loaded)


@pytest.mark.broad(2)
@pytest.mark.parametrize("steps", [1, 0])
def test_checkpoints_there_and_back(monkeypatch, tmp_path, steps):
    monkeypatch.setattr(initial_value, "WHOLE_BYTES", 0)

    def train(model):
        for _ in range(steps):
            model.train_on_batch(X[:12], Y[:12])
        gshard_tf.training_state(model)  # builds the optimizer

    expected = parity.run_plain(parity.compiled, train).model
    saved = parity.run_on_mesh(parity.compiled, train, **NONE).model
    manager = gshard_tf.CheckpointManager(tmp_path, asynchronous=False)
    manager.save(gshard_tf.training_state(saved), 1)
    # On another mesh, which has other values before.
    restored = parity.run_on_mesh(
        parity.compiled, lambda m: m.fit(X, Y, **FIT), 2, **NONE
    ).model
    manager.restore(gshard_tf.training_state(restored))
    assert_no_host_copy(restored)
    parity.assert_same_saved(restored, saved)
    for model in (expected, restored):
        model.train_on_batch(X[:12], Y[:12])
    parity.assert_same_state(restored, expected)


def test_a_value_of_another_shape_is_refused():
    model = parity.run_on_mesh(parity.compiled, lambda m: m.fit(X, Y, **FIT), **NONE)
    weight = model.model.layers[0].wi.value
    before = weight.numpy()
    with pytest.raises(ValueError, match=r"must have the shape \(8, 4, 6\).*Received"):
        weight.assign(np.zeros([8, 4, 5], "float32"))
    np.testing.assert_array_equal(weight.numpy(), before)


def test_small_ones_keep_their_copy():
    run = parity.run_on_mesh(
        parity.compiled, lambda m: m.fit(X, Y, **FIT), host_copy_bytes=500
    )
    dense = run.model.layers[-1]
    assert elements_on_host(run.model.layers[0].wi) == 0  # 768 bytes
    assert elements_on_host(dense.kernel) == 96  # 384 bytes


def test_a_function_of_ones_own_reads_a_fresh_value():
    def use(model):
        @tf.function
        def norm():
            return tf.reduce_sum(model.layers[0].wi ** 2)

        found = []
        for _ in range(2):
            model.train_on_batch(X[:12], Y[:12])
            found.append(float(norm()))
        return found

    _, meshed = parity.assert_equal_runs(parity.compiled, use, **NONE)
    gc.collect()
    # The function has gone, and with the next step the copy that it read from.
    meshed.model.train_on_batch(X[:12], Y[:12])
    assert_no_host_copy(meshed.model)


def test_without_memory():
    huge = [1 << 20, 1 << 20]  # 4 TiB
    assert resources.untouched(tf.TensorShape(huge), tf.float32).shape == huge
    for dtype in (tf.bool, tf.int8, tf.bfloat16, tf.float32, tf.complex128):
        for shape in ([], [0], [2, 3]):
            value = resources.untouched(tf.TensorShape(shape), dtype)
            assert value.dtype == dtype and value.shape == shape
            assert (
                value.numpy().tolist() == np.zeros(shape, dtype.as_numpy_dtype).tolist()
            )


@pytest.mark.parametrize("value", [-1, True])
def test_sizes_are_checked(value):
    with pytest.raises(ValueError, match="host_copy_bytes.*Received: host_copy_bytes="):
        parity.strategy_of(8, host_copy_bytes=value)
