"""What cannot work says so before it starts, and a failed step changes nothing."""

import re

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf

X, Y = parity.data(32)
FIT = {"batch_size": 16, "epochs": 1, "verbose": 0, "shuffle": False}
MESH = gshard_tf.create_mesh({"expert": 8})


def raises(message, error=ValueError):
    return pytest.raises(error, match="(?s)" + message)


# -- making a strategy ---------------------------------------------------------------


def test_mesh_larger_than_the_devices():
    with raises(
        r"\{'expert': 16\} needs 16 CPU devices and jax sees 8\. Make a smaller mesh\. "
        r".*Restart the process .* call gshard_tf\.request_cpu_devices\(16\) before"
    ):
        parity.strategy_of(16)


def test_mesh_of_other_devices():
    for kind in ("GPU", "TPU"):
        with raises(
            f"mesh is over {kind} devices, and jax finds none here.*"
            "JAX_PLATFORMS=cpu leaves them out. Received: "
        ):
            gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"x": 8}, device_type=kind))


@pytest.mark.parametrize("mesh", [None, 8, {"expert": 8}])
def test_what_is_no_mesh(mesh):
    with raises("`mesh` must be a tf.experimental.dtensor.Mesh.*Received: "):
        gshard_tf.SpmdStrategy(mesh)


def test_what_are_no_rules():
    with raises("`rules` must be an AxisRules or a .*Received: rules={'batch': 'exp"):
        gshard_tf.SpmdStrategy(MESH, {"batch": "expert"})


def test_rule_for_an_axis_that_the_mesh_lacks():
    with raises(
        r"'batch': 'data' must name an axis of the mesh, which has \['expert'\]"
    ):
        gshard_tf.SpmdStrategy(MESH, gshard_tf.AxisRules({"batch": "data"}))


# -- models and optimizers of another scope ------------------------------------------


def test_model_made_outside_the_scope():
    keras.backend.clear_session(free_memory=False)
    model = parity.classifier()
    strategy = gshard_tf.SpmdStrategy(MESH)
    with strategy.scope():
        # Keras refuses by itself here or there; whoever does must say where to go.
        with raises("scope"):
            model.compile("adam", "sparse_categorical_crossentropy")
            model.fit(X, Y, **FIT)


def test_weights_made_outside_the_scope():
    layer = parity.Experts()
    layer.build([None, 8, 4])
    with gshard_tf.SpmdStrategy(MESH).scope():
        model = keras.Sequential([layer, keras.layers.Flatten(), keras.layers.Dense(3)])
        model.compile("sgd", "sparse_categorical_crossentropy")
    with raises(
        "variable 'experts.*', which was not made inside this SpmdStrategy's scope"
    ):
        model.predict(X, verbose=0)


def test_optimizer_made_outside_the_scope():
    optimizer = keras.optimizers.Adam()
    with gshard_tf.SpmdStrategy(MESH).scope():
        model = parity.classifier()
        model.compile(optimizer, "sparse_categorical_crossentropy")
    with raises("optimizer must be made, and `compile` called, inside `with strategy"):
        model.fit(X, Y, **FIT)


def test_compile_and_lora_outside_the_scope():
    with gshard_tf.SpmdStrategy(MESH).scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("adam", "sparse_categorical_crossentropy")
    with raises("optimizer must be made, and `compile` called, inside `with strategy"):
        model.fit(X[:, 0], Y, **FIT)
    model.layers[0].enable_lora(2)
    with raises("call its `compile`, `quantize` and `enable_lora`, inside.*lora"):
        model.predict(X[:, 0], verbose=0)


def test_model_of_another_strategy():
    with parity.strategy_of(8).scope():
        model = parity.classifier()
    strategy = parity.strategy_of(8)
    with raises("was not made inside this SpmdStrategy's scope"):
        strategy.run(tf.function(lambda x: model(x)), args=(X,))


def test_layout_of_a_foreign_variable():
    strategy = gshard_tf.SpmdStrategy(MESH)
    with raises("'Variable:0', which was not made inside this SpmdStrategy's scope"):
        strategy.layout(tf.Variable(1.0))
    with raises("'w', which was not made inside this SpmdStrategy's scope"):
        strategy.layout(keras.Variable(1.0, name="w"))
    with parity.strategy_of(8).scope():
        other = tf.Variable(1.0)
    with raises("was not made inside this SpmdStrategy's scope"):
        strategy.layout(other)


# -- what a program cannot take ------------------------------------------------------


def test_jit_compile():
    with gshard_tf.SpmdStrategy(MESH).scope():
        model = parity.compiled(jit_compile=True)
    with raises("SpmdStrategy compiles the whole step itself.*jit_compile='auto'"):
        model.fit(X, Y, **FIT)


def test_run_inside_a_compiled_function():
    strategy = gshard_tf.SpmdStrategy(MESH)
    with raises("cannot stand inside a function with jit_compile=True"):
        tf.function(lambda: strategy.run(lambda: 1.0), jit_compile=True)()


def run(fn, *args):
    return parity.strategy_of(2).run(tf.function(fn), args=args)


@pytest.mark.parametrize(
    ("fn", "argument", "message"),
    [
        (tf.identity, tf.constant(["a"]), "computes with numbers.*dtype string"),
        (tf.identity, np.array(["a"]), "computes with numbers.*dtype string"),
        (tf.identity, tf.ragged.constant([[1], []]), "dense inputs.*RaggedTensor"),
        (tf.identity, tf.sparse.eye(2), "dense inputs.*SparseTensor"),
        (tf.RaggedTensor.from_tensor, tf.eye(2), "dense tensors.*RaggedTensor"),
        (
            lambda x: tf.unique(x)[0],
            tf.constant([1, 1]),
            "shape depends on values.*Unique",
        ),
        (
            lambda x: tf.reduce_sum(tf.boolean_mask(x, x > 0)),
            tf.eye(2),
            "shape depends on values.*Multiply by the mask",
        ),
        (tf.strings.as_string, tf.eye(2), "XLA cannot compile, on strings"),
        (
            lambda x: tf.py_function(lambda x: x, [x], tf.float32),
            tf.eye(2),
            "XLA cannot compile.*EagerPyFunc",
        ),
    ],
)
def test_what_xla_cannot_compile(fn, argument, message):
    with pytest.raises((ValueError, TypeError), match="(?s)" + message):
        run(fn, argument)


def test_printing_in_the_step():
    def step(x):
        tf.print("sum", tf.reduce_sum(x))
        return x

    with raises("XLA cannot compile, on strings.*callback"):
        run(step, tf.eye(2))


def test_summaries_in_the_step(tmp_path):
    def step(x):
        tf.summary.scalar("sum", tf.reduce_sum(x), step=tf.constant(0, tf.int64))
        return x

    with tf.summary.create_file_writer(str(tmp_path)).as_default():
        with raises("a resource that is no variable.*SummaryWriter"):
            run(step, tf.eye(2))


def test_strings_in_fit():
    with gshard_tf.SpmdStrategy(MESH).scope():
        model = keras.Sequential(
            [keras.layers.TextVectorization(vocabulary=["a"], output_mode="count")]
        )
        model.add(keras.layers.Dense(1))
        model.compile("sgd", "mse")
    with raises(
        "computes with numbers, and cannot hold others. Turn strings to numbers in the "
        "input pipeline"
    ):
        model.fit(tf.constant([["a"]] * 8), np.zeros([8, 1]), verbose=0)


def test_lookup_table_in_the_step():
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer([1, 2], [3, 4]), default_value=0
    )
    with raises("a resource that is no variable.*lookup table.*tf.data"):
        run(table.lookup, tf.constant([1, 2]))


def test_tensor_of_the_function_around_the_step():
    strategy = parity.strategy_of(2)

    @tf.function
    def outer(x):
        y = x * 2.0
        return strategy.run(lambda: y + 1.0)

    with raises("a tensor of the function around it.*argument of `strategy.run`"):
        outer(tf.ones([2]))


def test_error_of_the_step_itself_comes_through():
    with raises("no good", error=RuntimeError):

        def step(x):
            raise RuntimeError("no good")

        run(step, tf.eye(2))


# -- NaN -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked():
    return parity.run_on_mesh(
        lambda: parity.compiled("adam"),
        lambda m: m.fit(X, Y, **FIT),
        check_numerics=True,
    )


def assert_bits_unchanged(model, before):
    after = parity.state(model)
    for name in before:
        assert after[name].tobytes() == before[name].tobytes(), name


def test_check_numerics_changes_nothing_of_a_healthy_run(checked):
    plain = parity.run_plain(
        lambda: parity.compiled("adam"), lambda m: m.fit(X, Y, **FIT)
    )
    parity.assert_same_state(checked.model, plain.model)


def test_nan_in_the_input(checked):
    model = checked.model
    before = parity.state(model)
    steps = checked.strategy.extended.steps_run["train_step"]
    x = X[:16].copy()
    x[3, 2, 1] = np.nan
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=r"The model and its optimizer are as they were before that step\. "
        r"Received: NaN or infinity in argument 0 \(shape \(16, 8, 4\)\) of step "
        rf"{steps + 1} of train_step",
    ):
        model.train_on_batch(x, Y[:16])
    reset = {n: v for n, v in before.items() if "total" not in n and "count" not in n}
    assert_bits_unchanged(model, reset)
    assert isinstance(checked.strategy.last_error, FloatingPointError)


@pytest.mark.parametrize(
    ("scale", "found"),
    [(3e38, r"(result \d+|the new value of '[\w/]+')"), (np.inf, "argument 0")],
)
def test_nan_made_by_the_step_in_the_middle_of_fit(checked, scale, found):
    # The first batch is good and the second is not: what the first did stays.
    model = checked.model
    twin = parity.run_plain(lambda: parity.compiled("adam"), lambda m: None).model
    twin.set_weights(model.get_weights())
    twin.optimizer.build(twin.trainable_variables)
    for ours, theirs in zip(
        twin.optimizer.variables, model.optimizer.variables, strict=True
    ):
        ours.assign(theirs.numpy())
    twin.fit(X[:16], Y[:16], **FIT)

    x = X.copy()
    x[20] = np.sign(x[20]) * scale
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        model.fit(x, Y, **FIT)
    assert re.search(f"Received: NaN or infinity in {found} ", str(error.value))
    parity.assert_same_state(model, twin)
    # To the bit: the same again changes nothing.
    before = parity.state(model)
    with pytest.raises(tf.errors.InvalidArgumentError):
        model.train_on_batch(x[16:], Y[16:])
    reset = {n: v for n, v in before.items() if "total" not in n and "count" not in n}
    assert_bits_unchanged(model, reset)


def test_training_goes_on_after_nan(checked):
    model = checked.model
    with pytest.raises(tf.errors.InvalidArgumentError):
        model.train_on_batch(np.full_like(X[:16], np.nan), Y[:16])
    before = int(model.optimizer.iterations.numpy())
    history = model.fit(X, Y, **FIT).history
    assert np.isfinite(history["loss"]).all()
    assert int(model.optimizer.iterations.numpy()) == before + 2


def test_nan_in_evaluate_and_predict(checked):
    x = np.full_like(X[:16], np.nan)
    with pytest.raises(tf.errors.InvalidArgumentError, match="step 1 of test_step"):
        checked.model.evaluate(x, Y[:16], verbose=0)
    with pytest.raises(tf.errors.InvalidArgumentError, match="argument 0"):
        checked.model.predict(x, verbose=0)


def test_nan_in_bfloat16():
    strategy = parity.strategy_of(2, check_numerics=True)
    good = tf.constant([1.0, 2.0], tf.bfloat16)
    np.testing.assert_array_equal(
        strategy.run(tf.function(lambda x: x + x), args=(good,)), [2, 4]
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="in result 0"):
        strategy.run(tf.function(lambda x: x / (x - x)), args=(good,))


def test_without_the_check_nan_trains_on_as_in_keras():
    x = X.copy()
    x[3] = np.nan
    model = parity.run_on_mesh(parity.compiled, lambda m: m.fit(x, Y, **FIT)).model
    assert np.isnan(model.get_weights()[0]).any()


# -- a step that fails ---------------------------------------------------------------


def test_a_step_that_fails_changes_nothing():
    class Picky(keras.layers.Layer):
        def call(self, x):
            if x.shape[0] == 3:
                raise RuntimeError("not three")
            return x

    def make():
        model = parity.classifier()
        model.add(Picky())
        model.compile("adam", "mse")
        return model

    y = np.zeros([35, 3], "float32")
    run = parity.run_on_mesh(make, lambda m: m.fit(X, y[:32], **FIT))
    before = parity.state(run.model)
    with pytest.raises(tf.errors.UnknownError, match="RuntimeError.*not three"):
        run.model.predict(parity.data(35)[0], batch_size=16, verbose=0)
    assert "not three" in str(run.strategy.last_error)
    assert_bits_unchanged(run.model, before)
    run.model.fit(X, y[:32], **FIT)


def test_a_lost_state_says_so():
    # What a failure of the runtime itself in the middle of a step would leave behind.
    run = parity.run_on_mesh(parity.compiled, lambda m: m.fit(X, Y, **FIT))
    weight = run.model.layers[0].wi
    weight.value.device_copy.delete()
    with raises(
        "sequential/experts/wi:0' was lost in a step.*checkpoint", error=RuntimeError
    ):
        weight.numpy()
    with pytest.raises(tf.errors.UnknownError, match="lost"):
        run.model.fit(X, Y, **FIT)
    weight.assign(np.zeros([8, 4, 6]))
    run.model.fit(X, Y, **FIT)
