"""Gradients of tables are dense on a mesh: every optimizer, every way to look up."""

import functools

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.spmd.abstract import AbstractStrategy, lower_abstract

K = keras.optimizers
V, M = 24, 8
# Ids come back, within an example and in others; ids of 16 and more never come.
IDS = np.random.default_rng(0).integers(0, 16, size=[16, 4]).astype("int32")
LABELS = (IDS[:, 0] % 3).astype("int32")

OPTIMIZERS = {
    "SGD": lambda: K.SGD(0.1),
    "SGD momentum": lambda: K.SGD(0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda: K.RMSprop(1e-2, momentum=0.9, centered=True),
    "Adam": lambda: K.Adam(1e-2, amsgrad=True),
    "AdamW": lambda: K.AdamW(1e-2, weight_decay=0.01),
    "Adadelta": lambda: K.Adadelta(1.0),
    "Adagrad": lambda: K.Adagrad(1e-1),
    "Adamax": lambda: K.Adamax(1e-2),
    "Adafactor": lambda: K.Adafactor(1e-2),
    "Nadam": lambda: K.Nadam(1e-2),
    "Ftrl": lambda: K.Ftrl(1e-1),
    "Lion": lambda: K.Lion(1e-3),
    "Lamb": lambda: K.Lamb(1e-2),
    "Muon": lambda: K.Muon(1e-2, exclude_embeddings=False),
    "ScheduleFreeAdamW": lambda: K.ScheduleFreeAdamW(1e-2),
    "MultiOptimizer": lambda: K.MultiOptimizer(
        K.OptimizerMap(K.SGD(0.1), {"embedding/embeddings": K.Adagrad(1e-1)})
    ),
    "LossScaleOptimizer": lambda: K.LossScaleOptimizer(K.Adagrad(1e-1)),
}
# Those that an older Keras lacks.
for _name in ("ScheduleFreeAdamW", "MultiOptimizer"):
    if not hasattr(K, _name):
        del OPTIMIZERS[_name]


class OneHotEmbedding(keras.layers.Embedding):
    """A look-up as a product, whose gradient is dense in plain Keras too."""

    def call(self, ids):
        return tf.one_hot(ids, self.input_dim) @ tf.convert_to_tensor(self.embeddings)


def classifier(optimizer, embedding=keras.layers.Embedding):
    model = keras.Sequential(
        [
            keras.layers.Input([4], dtype="int32"),
            embedding(V, M, name="embedding"),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(OPTIMIZERS[optimizer](), loss)
    # Plain Keras would make the slots within its graph, where what ScheduleFreeAdamW
    # gives them at first is given anew in every step.
    # (Keras builds it again, which LossScaleOptimizer answers with other variables.)
    if optimizer != "LossScaleOptimizer":
        model.optimizer.build(model.trainable_variables)
    return model


def three_steps(model):
    return [model.train_on_batch(IDS, LABELS) for _ in range(3)]


@functools.cache
def plain(optimizer):
    return parity.run_plain(lambda: classifier(optimizer, OneHotEmbedding), three_steps)


def test_all_of_keras_optimizers_are_tried():
    known = {
        name
        for name, each in vars(K).items()
        if isinstance(each, type) and issubclass(each, K.Optimizer)
    }
    tried = {type(make()).__name__ for make in OPTIMIZERS.values()}
    assert tried == known - {"Optimizer"}


@pytest.mark.broad(5)
@pytest.mark.parametrize("partitions", [1, 8])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_embedding_trains_as_with_a_dense_gradient(optimizer, partitions):
    expected = plain(optimizer)
    rules = gshard_tf.AxisRules(
        {"batch": "expert", "vocab": "expert"},
        paths=[(r".*embedding/embeddings", ("vocab", None))],
    )
    found = parity.run_on_mesh(
        lambda: classifier(optimizer), three_steps, partitions, rules=rules
    )
    parity.assert_close(found.result, expected.result, parity.RTOL, "losses")
    parity.assert_same_state(found.model, expected.model)


# -- ways to look up -----------------------------------------------------------------

ROWS = tf.constant([3, 1, 3, 5])
TABLE = np.random.default_rng(1).normal(size=[V, M]).astype("float32")


def in_function(table):
    return tf.function(lambda: tf.gather(table, ROWS), autograph=False)()


def in_branch(table):
    return tf.cond(
        tf.reduce_sum(ROWS) > 0,
        lambda: tf.gather(table, ROWS),
        lambda: tf.gather(table, ROWS + 1),
    )


def in_loop(table):
    def body(i, total):
        return i + 1, total + tf.gather(table, ROWS + i)

    zeros = tf.zeros([4, M])
    return tf.while_loop(
        lambda i, _: i < 3, body, [tf.constant(0), zeros], maximum_iterations=3
    )[1]


def recomputed(table):
    return tf.recompute_grad(lambda: tf.gather(table, ROWS))()


LOOK_UPS = {
    "gather": lambda t: tf.gather(t, ROWS),
    "of an id": lambda t: tf.gather(t, 3),
    "of ids [2, 2]": lambda t: tf.gather(t, tf.reshape(ROWS, [2, 2])),
    "columns": lambda t: tf.gather(t, ROWS, axis=1),
    "sparse_read": lambda t: t.sparse_read(ROWS),
    "gather_nd of rows": lambda t: t.gather_nd(ROWS[:, None]),
    "gather_nd": lambda t: tf.gather_nd(t, [[3, 1], [0, 0], [3, 1]]),
    "embedding_lookup": lambda t: tf.nn.embedding_lookup(t, ROWS),
    "max_norm": lambda t: tf.nn.embedding_lookup(t, ROWS, max_norm=1.0),
    "keras take": lambda t: keras.ops.take(t, ROWS, axis=0),
    "of the value": lambda t: tf.gather(tf.convert_to_tensor(t), ROWS),
    "int64": lambda t: tf.gather(t, tf.cast(ROWS, tf.int64)),
    "twice and whole": lambda t: (
        tf.gather(t, ROWS) * tf.gather(t, ROWS + 1) + tf.reduce_sum(t)
    ),
    "slice": lambda t: t[3:5],
    "bfloat16": lambda t: tf.cast(tf.gather(tf.cast(t, tf.bfloat16), ROWS), tf.float32),
    "function": in_function,
    "branch": in_branch,
    "loop": in_loop,
    "recomputed": recomputed,
}
KINDS = {}


def gradients(table):
    """Of every way to look up, once more of one tape, and of its own gradient."""
    found = {}
    for name, look_up in LOOK_UPS.items():
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_sum(look_up(table) ** 3)
        found[name] = tape.gradient(loss, table)
        found[f"{name}, again"] = tape.gradient(loss, table)
    with tf.GradientTape() as outer:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table, ROWS) ** 3)
        first = tf.convert_to_tensor(tape.gradient(loss, table))
        loss = tf.reduce_sum(first**2)
    found["second order"] = outer.gradient(loss, table)
    found["of a graph"] = tf.gradients(tf.gather(table, ROWS) ** 3, table)[0]
    with tf.autodiff.ForwardAccumulator(table, tf.ones([V, M])) as forward:
        rows = tf.gather(table, ROWS) ** 3
    found["forward"] = forward.jvp(rows)
    KINDS.update({name: type(each) for name, each in found.items()})
    return {name: tf.convert_to_tensor(each) for name, each in found.items()}


@pytest.fixture(scope="module")
def looked_up():
    """The gradients in plain TensorFlow and on a mesh, and their types there."""
    expected = tf.function(gradients, autograph=False)(tf.Variable(TABLE))
    strategy = parity.strategy_of(8)
    with strategy.scope():
        table = tf.Variable(TABLE)
    KINDS.clear()
    step = tf.function(lambda: gradients(table), autograph=False)
    return expected, strategy.run(step), dict(KINDS)


@pytest.mark.parametrize(
    "name",
    [*LOOK_UPS, *(f"{n}, again" for n in LOOK_UPS), "second order", "of a graph"],
)
def test_a_gradient_is_tensorflows_and_dense(looked_up, name):
    expected, found, kinds = looked_up
    assert not issubclass(kinds[name], tf.IndexedSlices)
    tolerance = 1e-2 if "bfloat16" in name else 1e-5
    parity.assert_close(found[name], expected[name], tolerance, name)


def test_forward_mode_is_tensorflows(looked_up):
    expected, found, _ = looked_up
    parity.assert_close(found["forward"], expected["forward"], 1e-5, "forward")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_summed_in_float32(dtype):
    strategy = parity.strategy_of(8)
    with strategy.scope():
        table = tf.Variable(tf.zeros([4, 2], dtype))

    @tf.function(autograph=False)
    def step(ids):
        with tf.GradientTape() as tape:
            # 0.1 has no end in binary, so that a sum in halves loses it.
            loss = tf.reduce_sum(tf.gather(table, ids) * tf.cast(0.1, dtype))
        gradient = tape.gradient(loss, table)
        assert gradient.dtype == dtype
        return tf.cast(gradient, tf.float32)

    gradient = strategy.run(step, args=(tf.ones([6400], tf.int32),))
    np.testing.assert_allclose(gradient[1], 640.0, rtol=5e-3)
    np.testing.assert_array_equal(gradient[0], 0.0)


def test_ids_out_of_range_are_as_in_tensorflows_xla():
    ids = tf.constant([0, V, -1, V + 7, 2, 2, V - 1, -V])

    def rows_and_gradient(table):
        with tf.GradientTape() as tape:
            rows = tf.gather(table, ids)
            loss = tf.reduce_sum(rows**2)
        return rows, tf.convert_to_tensor(tape.gradient(loss, table))

    variable = tf.Variable(TABLE)
    expected = tf.function(lambda: rows_and_gradient(variable), jit_compile=True)()
    strategy = parity.strategy_of(8)
    with strategy.scope():
        table = tf.Variable(TABLE)
    found = strategy.run(tf.function(lambda: rows_and_gradient(table)))
    parity.assert_close(list(found), list(expected), 1e-6, "rows, gradient")


def test_a_table_of_integers_has_no_gradient():
    strategy = parity.strategy_of(8)
    with strategy.scope():
        table = tf.Variable(tf.range(V))
        weight = tf.Variable(2.0)

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            rows = tf.cast(tf.gather(table, ROWS), tf.float32)
            loss = tf.reduce_sum(rows * weight)
        gradients = tape.gradient(loss, [table, weight])
        assert gradients[0] is None
        return gradients[1]

    assert float(strategy.run(step)) == 12.0


def test_a_plan_has_dense_gradients_too():
    strategy = AbstractStrategy(gshard_tf.create_mesh({"expert": 8}))
    with strategy.scope():
        table = tf.Variable(tf.zeros([V, M]))
    kinds = []

    def step(ids):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table, ids) ** 3)
        gradient = tape.gradient(loss, table)
        kinds.append(type(gradient))
        return tf.convert_to_tensor(gradient)

    lower_abstract(strategy.extended, step, [tf.TensorSpec([4], tf.int32)])
    assert not issubclass(kinds[0], tf.IndexedSlices)


# -- what is communicated --------------------------------------------------------------


def collectives_of(mesh, rules, axes):
    """Kinds and shapes of arrays that a train step communicates; V is 48 here."""

    def make():
        model = keras.Sequential(
            [
                keras.layers.Input([4], dtype="int32"),
                keras.layers.Embedding(48, 32, name="embedding"),
                keras.layers.GlobalAveragePooling1D(),
                keras.layers.Dense(3),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(K.Adam(), loss)
        return model

    rules = gshard_tf.AxisRules(rules, paths=[(r".*/embeddings", axes)])
    run = parity.run_on_mesh(make, three_steps, mesh, rules=rules)
    return [
        (each.kind, dims)
        for each in run.strategy.programs[-1].collectives()
        for _, dims in each.shapes
    ]


def test_a_table_split_by_rows_over_another_axis_is_never_gathered():
    found = collectives_of(
        {"data": 2, "model": 4}, {"batch": "data", "vocab": "model"}, ("vocab", None)
    )
    # Look-ups of 8 examples from all parts of the table; then a device's 12 rows of
    # the gradient, summed over the two halves of the batch.
    large = [each for each in found if np.prod(each[1]) >= 12 * 32]
    assert sorted(large) == [("all-reduce", (8, 4, 32)), ("all-reduce", (12, 32))]


def test_a_table_split_by_columns_is_never_gathered():
    found = collectives_of(
        {"data": 2, "model": 4}, {"batch": "data", "embed": "model"}, (None, "embed")
    )
    large = [each for each in found if np.prod(each[1]) >= 48 * 8]
    assert large == [("all-reduce", (48, 8))]


def test_a_table_split_over_the_axis_of_the_batch_is_gathered_once():
    found = collectives_of(8, {"batch": "expert", "vocab": "expert"}, ("vocab", None))
    large = [each for each in found if np.prod(each[1]) >= 48 * 32]
    assert sorted(large) == [("all-gather", (48, 32)), ("all-reduce", (48, 32))]
