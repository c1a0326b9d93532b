"""`strategy.run` without `fit`."""

import gc
import weakref

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

X, Y = parity.data(32)


@pytest.fixture
def strategy():
    return parity.strategy_of(8)


def batches():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)


def gradient_step(model, optimizer):
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        optimizer.apply(
            tape.gradient(loss, model.trainable_weights), model.trainable_weights
        )
        return loss

    return step


def plain_losses():
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    model, optimizer = parity.classifier(), keras.optimizers.Adam(1e-2)
    step = gradient_step(model, optimizer)
    return [float(step(batch)) for batch in batches()], model


def make(strategy):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    with strategy.scope():
        model, optimizer = parity.classifier(), keras.optimizers.Adam(1e-2)
        optimizer.build(model.trainable_weights)
    return model, gradient_step(model, optimizer)


def test_run_inside_a_tf_function(strategy):
    expected, plain = plain_losses()
    model, step = make(strategy)

    @tf.function
    def train(batch):
        return strategy.reduce("MEAN", strategy.run(step, args=(batch,)), axis=None)

    found = [float(train(batch)) for batch in batches()]
    parity.assert_close(found, expected, parity.RTOL, "loss")
    parity.assert_same_state(model, plain)


def test_a_whole_epoch_in_one_tf_function(strategy):
    expected, plain = plain_losses()
    model, step = make(strategy)

    @tf.function
    def epoch(dataset):
        total = 0.0
        for batch in dataset:
            total += strategy.run(step, args=(batch,))
        return total

    found = epoch(strategy.experimental_distribute_dataset(batches()))
    parity.assert_close(found, sum(expected), parity.RTOL, "loss")
    parity.assert_same_state(model, plain)


def test_run_of_a_tf_function_compiles_once(strategy):
    expected, plain = plain_losses()
    model, step = make(strategy)
    step = tf.function(step)
    found = [float(strategy.run(step, args=(batch,))) for batch in batches()]
    parity.assert_close(found, expected, parity.RTOL, "loss")
    parity.assert_same_state(model, plain)
    assert len(strategy.programs) == 1


def test_programs_go_with_their_function(strategy):
    model, step = make(strategy)
    step = tf.function(step)
    strategy.run(step, args=(next(iter(batches())),))
    program = weakref.ref(strategy.programs[0])
    del step
    gc.collect()
    assert program() is None and strategy.programs == []
    # And the state that it left is whole.
    assert np.isfinite(model.layers[0].wi.numpy()).all()


def test_arguments_of_all_kinds(strategy):
    with strategy.scope():
        variable = tf.Variable([1.0, 2.0])

    @tf.function
    def step(x, variable, scale, none, text, *, offset):
        assert none is None and text == "text" and isinstance(scale, float)
        variable.assign_add(x * scale)
        return {"sum": variable + offset, "none": none, "pair": (x, x)}

    def run(scale):
        return strategy.run(
            step,
            args=(np.array([1.0, 1.0], "float32"), variable, scale, None, "text"),
            kwargs={"offset": tf.constant(0.5)},
        )

    found = run(2.0)
    np.testing.assert_array_equal(found["sum"], [3.5, 4.5])
    assert found["none"] is None and len(found["pair"]) == 2
    run(2.0)
    assert len(strategy.programs) == 1
    # A Python number is part of the program.
    np.testing.assert_array_equal(run(10.0)["sum"], [15.5, 16.5])
    assert len(strategy.programs) == 2
    np.testing.assert_array_equal(variable, [15.0, 16.0])


def test_steps_without_results_and_without_arguments(strategy):
    with strategy.scope():
        counter = tf.Variable(0, dtype=tf.int64)

    @tf.function
    def step():
        counter.assign_add(1)

    for _ in range(3):
        assert strategy.run(step) is None
    assert counter.numpy() == 3
    with strategy.scope():
        strategy.run(step)
    assert counter.numpy() == 4


def test_eager_run_of_a_plain_function_is_eager(strategy):
    with strategy.scope():
        variable = tf.Variable(1.0)
    found = strategy.run(lambda x: variable.assign_add(x), args=(2.0,))
    assert float(found) == 3.0 and strategy.programs == []


def test_constants_that_the_step_closes_over(strategy):
    table = tf.constant(np.arange(12, dtype="float32").reshape(4, 3))

    @tf.function
    def step(i):
        return tf.gather(table, i) * np.float32(2)

    found = strategy.run(step, args=(tf.constant([3, 0, 1]),))
    np.testing.assert_array_equal(found, 2 * table.numpy()[[3, 0, 1]])


def test_control_flow_and_integers_and_assignments_of_slices(strategy):
    with strategy.scope():
        table = tf.Variable(np.zeros([8, 2], "float32"))
        count = tf.Variable(0, dtype=tf.int32)

    @tf.function
    def step(rows, flag):
        if flag:
            count.assign_add(tf.size(rows))
        for _ in tf.range(2):
            table.scatter_add(tf.IndexedSlices(tf.ones([3, 2]), rows))
        table[0, 1].assign(9.0)
        return tf.gather(table, rows)

    rows = tf.constant([5, 2, 5])
    strategy.run(step, args=(rows, tf.constant(True)))
    strategy.run(step, args=(rows, tf.constant(False)))
    assert count.numpy() == 3
    expected = np.zeros([8, 2])
    expected[5], expected[2], expected[0, 1] = 8.0, 4.0, 9.0
    np.testing.assert_array_equal(table, expected)


def test_the_other_methods_of_a_strategy(strategy):
    assert strategy.num_replicas_in_sync == 1
    value = strategy.run(tf.function(lambda x: x * 2.0), args=(tf.ones([4, 2]),))
    assert strategy.experimental_local_results(value)[0] is value
    assert float(strategy.reduce("SUM", value, axis=0)[0]) == 8.0
    assert strategy.gather(value, axis=0).shape == (4, 2)
    dataset = strategy.distribute_datasets_from_function(
        lambda context: batches().take(context.num_input_pipelines)
    )
    [(x, y)] = dataset
    assert x.shape == (16, 8, 4)
    with strategy.scope():
        assert tf.distribute.get_strategy() is strategy
        metric = tf.Variable(
            0.0,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )
    strategy.run(tf.function(lambda: metric.assign_add(2.0)))
    assert float(metric) == 2.0


def test_a_variable_of_which_a_step_uses_the_handle_alone():
    """As the fused operations of Keras 2's legacy optimizers do with their slots."""
    strategy = parity.strategy_of(8)
    with strategy.scope():
        weight = tf.Variable(tf.ones([8]))
        momentum = tf.Variable(tf.zeros([8]), trainable=False)

    @tf.function(autograph=False)
    def step(gradient):
        tf.raw_ops.ResourceApplyMomentum(
            var=weight.handle,
            accum=momentum.handle,
            lr=0.5,
            grad=gradient,
            momentum=0.9,
        )
        return tf.reduce_sum(gradient)

    for _ in range(2):
        strategy.run(step, args=(tf.ones([8]),))
    np.testing.assert_allclose(momentum.numpy(), np.full([8], 1.9), rtol=1e-6)
    np.testing.assert_allclose(weight.numpy(), np.full([8], -0.45), rtol=1e-6)


KINDS = {
    "python": {"int": 3, "float": 1.5, "bool": True, "complex": 1j},
    "numpy": [np.float32(2), np.float64(2), np.int64(4), np.ones(2)],
    "strings": {"text": "abc", "bytes": (b"a", None)},
    "none": None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_returns_besides_tensors(strategy, kind):
    """As TensorFlow's strategy of one device hands it out, where `run` is called."""
    calls = {}
    plain = tf.distribute.OneDeviceStrategy("/cpu:0")
    for name, where in {"mesh": strategy, "plain": plain}.items():

        @tf.function
        def run(x, where=where, name=name):
            found = where.run(
                lambda x: {"sum": tf.reduce_sum(x), kind: KINDS[kind]}, (x,)
            )
            calls[name] = [type(leaf) for leaf in tf.nest.flatten(found)]
            return found

        calls[name, "result"] = run(tf.ones([8]))
    assert calls["mesh"] == calls["plain"]
    ours, theirs = calls["mesh", "result"], calls["plain", "result"]
    tf.nest.assert_same_structure(ours, theirs)
    for a, b in zip(tf.nest.flatten(ours), tf.nest.flatten(theirs), strict=True):
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert len(strategy.programs) == 1


def test_functions_that_run_eagerly(strategy):
    """`tf.config.run_functions_eagerly`: as plain, then on the mesh again."""
    expected, plain = plain_losses()
    model, step = make(strategy)
    step = tf.function(step)
    first, second = batches()
    tf.config.run_functions_eagerly(True)
    try:
        found = [float(strategy.run(step, args=(first,)))]
    finally:
        tf.config.run_functions_eagerly(False)
    assert not strategy.programs
    found.append(float(strategy.run(step, args=(second,))))
    assert len(strategy.programs) == 1
    parity.assert_close(found, expected, parity.RTOL, "loss")
    parity.assert_same_state(model, plain)
