"""Whoever reads a variable gets its fresh value; whoever writes one is heard."""

import gc
import threading

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

X, Y = parity.data(32)
FIT = {"batch_size": 16, "epochs": 1, "verbose": 0, "shuffle": False}


@pytest.fixture(scope="module")
def pair():
    """A model on the mesh and its plain twin, which do everything in step."""
    plain = parity.run_plain(lambda: parity.compiled("sgd"), lambda m: None).model
    meshed = parity.run_on_mesh(lambda: parity.compiled("sgd"), lambda m: None)
    both(plain, meshed.model, lambda m: m.fit(X, Y, **FIT))
    return plain, meshed.model, meshed.strategy


def both(plain, meshed, use):
    expected, found = use(plain), use(meshed)
    parity.assert_close(found, expected, parity.RTOL, "result")
    parity.assert_same_state(meshed, plain)


def weight(model):
    return model.layers[0].wi


def on_device(variable):
    return variable.value.device_copy is not None


def test_state_stays_on_the_devices_between_steps(pair):
    _, meshed, strategy = pair
    meshed.fit(X, Y, **FIT)
    moved = []
    to_host = strategy.extended.transfer.to_host
    strategy.extended.transfer.to_host = lambda v: moved.append(v.shape) or to_host(v)
    put = strategy.extended.placement.put
    strategy.extended.placement.put = lambda v, *a: moved.append(v.shape) or put(v, *a)
    try:
        meshed.fit(X, Y, **FIT)
    finally:
        strategy.extended.transfer.to_host = to_host
        del strategy.extended.placement.put
    # Metrics and counters come and go: scalars, all of them.
    assert set(moved) <= {()}, moved
    assert all(not v.value._has_reader_graphs() for v in meshed.variables)
    pair[0].fit(X, Y, **FIT)
    pair[0].fit(X, Y, **FIT)


READS = {
    "numpy": lambda v: v.numpy(),
    "array": lambda v: np.asarray(v),
    "value": lambda v: np.array(v.value),
    "read_value": lambda v: v.value.read_value(),
    "convert": lambda v: tf.convert_to_tensor(v),
    "identity": lambda v: tf.identity(v.value),
    "arithmetic": lambda v: v * 2.0 + 1.0,
    "raw op": lambda v: tf.raw_ops.Neg(x=v.value),
    "matmul": lambda v: tf.matmul(tf.ones([8, 2, 4]), v.value),
    "concat": lambda v: tf.concat([v.value, v.value], 0),
    "tape": lambda v: gradient_of(v),
    "layer": lambda v: keras.ops.einsum("emh->eh", v),
    "slice": lambda v: v[2],
    "gather": lambda v: tf.gather(v.value, [3, 1]),
    "sparse_read": lambda v: v.value.sparse_read([3, 1]),
    "gather_nd": lambda v: v.value.gather_nd([[3, 1], [0, 0]]),
    "keras op": lambda v: keras.ops.sum(v),
    "deepcopy": lambda v: __import__("copy").deepcopy(v.value).numpy(),
    "tf.function": lambda v: tf.function(lambda: v + 0.0)(),
    "jit": lambda v: tf.function(lambda: v + 0.0, jit_compile=True)(),
    "cond": lambda v: tf.function(
        lambda: tf.cond(tf.constant(True), lambda: v + 0.0, lambda: v * 0.0)
    )(),
    "count": lambda v: tf.math.count_nonzero(v.value),
    "thread": lambda v: in_thread(lambda: v.numpy()),
}


def gradient_of(v):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(v.value**2)
    return tape.gradient(loss, v.value)


def in_thread(fn):
    found = []
    thread = threading.Thread(target=lambda: found.append(fn()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.broad(2)
@pytest.mark.parametrize("how", READS)
def test_reads_see_what_the_step_made(pair, how):
    plain, meshed, _ = pair

    def use(model):
        logs = model.train_on_batch(X[:16], Y[:16])
        return logs, np.array(READS[how](weight(model)))

    both(plain, meshed, use)
    gc.collect()


VALUES = np.random.default_rng(1).normal(size=[8, 4, 6]).astype("float32")


def slice_assign(v):
    v.value[2, 1:3].assign(VALUES[0, :2])


def graph_assign(v):
    tf.function(lambda: v.assign(VALUES))()


WRITES = {
    "assign": lambda v: v.assign(VALUES),
    "assign_add": lambda v: v.assign_add(VALUES),
    "assign_sub": lambda v: v.assign_sub(VALUES),
    "tf assign": lambda v: v.value.assign(VALUES, read_value=False),
    "slice": slice_assign,
    "scatter": lambda v: v.value.scatter_update(tf.IndexedSlices(VALUES[:1], [5])),
    "scatter_nd": lambda v: v.value.scatter_nd_add([[1, 2]], VALUES[0, :1]),
    "raw": lambda v: tf.raw_ops.AssignVariableOp(resource=v.value.handle, value=VALUES),
    "tf.function": graph_assign,
    "thread": lambda v: in_thread(lambda: v.assign(VALUES)),
}


@pytest.mark.parametrize("how", WRITES)
def test_the_step_sees_writes(pair, how):
    plain, meshed, _ = pair

    def use(model):
        model.train_on_batch(X[:16], Y[:16])
        WRITES[how](weight(model))
        written = weight(model).numpy()
        logs = model.train_on_batch(X[:16], Y[:16])
        return written, logs, weight(model).numpy()

    both(plain, meshed, use)
    gc.collect()


def test_the_model_itself_in_eager_mode(pair):
    plain, meshed, _ = pair

    def use(model):
        logs = model.train_on_batch(X[:16], Y[:16])
        return logs, model(X).numpy()

    both(plain, meshed, use)


def test_set_weights_and_layers_weights(pair):
    plain, meshed, _ = pair

    def use(model):
        weights = model.get_weights()
        model.set_weights([w * 0.5 for w in weights])
        first = model.train_on_batch(X[:16], Y[:16])
        model.layers[0].set_weights([w * 2 for w in model.layers[0].get_weights()])
        second = model.train_on_batch(X[:16], Y[:16])
        return first, second, model.get_weights()

    both(plain, meshed, use)


def test_a_function_of_the_users_between_steps(pair):
    # It reads and writes the resource without asking us, every time it is called.
    plain, meshed, _ = pair

    def use(model):
        v = weight(model)

        @tf.function
        def decay():
            v.assign(v * 0.9)
            return tf.reduce_sum(v)

        @tf.function
        def outer():
            return decay() + 1.0

        found = []
        for _ in range(2):
            found.append(model.train_on_batch(X[:16], Y[:16]))
            found.append(decay().numpy())
            found.append(outer().numpy())
            found.append(v.numpy())
        found.append(model.fit(X, Y, **FIT).history)
        return found

    both(plain, meshed, use)
    gc.collect()


def test_a_function_inside_a_function_that_has_gone(pair):
    plain, meshed, _ = pair

    def use(model):
        v = weight(model)

        def make():
            inner = tf.function(lambda: v.assign_add(tf.ones_like(v)))
            inner()  # traced alone, so that no graph is around it
            outer = tf.function(lambda: inner() + 0.0)
            outer()
            return outer.get_concrete_function()

        outer = make()
        gc.collect()
        found = []
        for _ in range(2):
            found.append(model.train_on_batch(X[:16], Y[:16]))
            found.append(outer().numpy())
            found.append(v.numpy())
        return found

    both(plain, meshed, use)


def test_a_pipeline_that_reads_a_weight(pair):
    plain, meshed, _ = pair

    def use(model):
        bias = model.layers[-1].bias
        dataset = (
            tf.data.Dataset.from_tensor_slices((X[:16], Y[:16]))
            .batch(16)
            .map(lambda x, y: (x + tf.reduce_sum(bias), y))
        )
        return [model.fit(dataset, verbose=0).history for _ in range(2)]

    both(plain, meshed, use)
    gc.collect()


def test_the_state_is_on_the_devices_again_when_the_users_function_has_gone(pair):
    _, meshed, _ = pair
    v = weight(meshed)
    read = tf.function(lambda: v + 0.0)
    read()
    meshed.train_on_batch(X[:16], Y[:16])
    assert v.value._has_reader_graphs()
    del read
    gc.collect()
    assert not v.value._has_reader_graphs()
    meshed.train_on_batch(X[:16], Y[:16])
    assert on_device(v) and not v.value._host_is_current
    pair[0].set_weights(meshed.get_weights())
    for ours, theirs in zip(
        pair[0].optimizer.variables, meshed.optimizer.variables, strict=True
    ):
        ours.assign(theirs.numpy())


def test_shape_inference_is_no_reader(pair):
    _, meshed, _ = pair
    meshed.compute_output_spec(keras.KerasTensor([16, 8, 4]))
    meshed.compute_output_shape([None, 8, 4])
    assert not any(v.value._has_reader_graphs() for v in meshed.variables)


def test_threads_read_while_fit_runs():
    run = parity.run_on_mesh(lambda: parity.compiled("adam"), lambda m: None)
    model, done, failed, reads = run.model, threading.Event(), [], []

    def read():
        # A step changes both at once, so a reader must never see one without the
        # other: the counter of a step and the slots' sum that belongs to it.
        try:
            while not done.is_set():
                values = [v.numpy() for v in model.variables]
                assert all(np.isfinite(v).all() for v in values)
                reads.append(int(model.optimizer.iterations.numpy()))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        history = model.fit(X, Y, **{**FIT, "epochs": 10}).history
    finally:
        done.set()
        for thread in threads:
            thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failed, failed
    assert max(reads) == 20 and len(set(reads)) > 2
    plain = parity.run_plain(
        lambda: parity.compiled("adam"),
        lambda m: m.fit(X, Y, **{**FIT, "epochs": 10}).history,
    )
    parity.assert_close(history, plain.result, parity.RTOL, "history")
    parity.assert_same_state(model, plain.model)


def test_a_variable_of_two_programs():
    run = parity.run_on_mesh(parity.compiled, lambda m: None)
    for _ in range(2):
        run.model.train_on_batch(X[:16], Y[:16])
        trained = run.model.layers[0].wi.numpy()
        predicted = run.model.predict_on_batch(X[:8])
        np.testing.assert_allclose(predicted, run.model(X[:8]), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(run.model.layers[0].wi.numpy(), trained)


def test_variables_are_tensorflows():
    strategy = parity.strategy_of(8)
    with strategy.scope():
        v = tf.Variable([1.0, 2.0], name="v", trainable=False)
    assert isinstance(v, tf.Variable) and not v.trainable and v.name == "v:0"
    assert v.shape == (2,) and v.dtype == tf.float32 and "CPU" in v.device
    assert bool(v.is_initialized())
    with tf.GradientTape() as tape:
        tape.watch(v)
        loss = tf.reduce_sum(v**2)
    np.testing.assert_array_equal(tape.gradient(loss, v), [2.0, 4.0])
