"""`plan()` against the programs that `SpmdStrategy` really runs."""

import collections
import re
import resource

import keras
import numpy as np
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.planning import planner
from keras_layers import MoELayer, Transformer

DIM, LENGTH, CORES = 16, 8, 8


def moe_model():
    inputs = keras.Input((LENGTH, DIM))
    x = inputs + MoELayer(CORES, 32, seed=0, name="moe")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(4, name="head")(x), name="tiny")
    model.compile("adam", "mse", metrics=["mae"])
    return model


def batch(rows=CORES):
    x = tf.TensorSpec([rows, LENGTH, DIM], tf.float32)
    return x, tf.TensorSpec([rows, LENGTH, 4], tf.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A plan, the folder that it is cached in, and the program that really runs."""
    folder = tmp_path_factory.mktemp("plans")
    keras.backend.clear_session(free_memory=False)
    planned = gshard_tf.plan(moe_model, "cpu:8", batch=batch(), cache=folder)
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": CORES}))
    keras.backend.clear_session(free_memory=False)
    with strategy.scope():
        model = moe_model()
    x, y = (np.zeros(spec.shape, np.float32) for spec in batch())
    model.fit(x, y, batch_size=CORES, verbose=0)
    return planned, folder, strategy.programs[-1]


def test_a_plan_is_of_the_program_that_runs(made):
    planned, _, program = made
    real = dict((path, (all_, local)) for path, all_, local in
                program.argument_bytes())  # fmt: skip
    found = {w.path: (w.bytes, w.bytes_per_core) for w in planned.weights}
    for path, sizes in real.items():
        if path != "constant":
            assert found[path] == sizes
    kinds = collections.Counter()
    for c in planned.communication:
        kinds[c.kind] += c.count
    assert kinds == collections.Counter(c.kind for c in program.collectives())
    memory = program.compiled.memory_analysis()
    # `fit` hands over two more scalars of its own.
    assert planned.memory.arguments == pytest.approx(
        memory.argument_size_in_bytes, abs=64
    )
    assert planned.memory.temporaries == pytest.approx(
        memory.temp_size_in_bytes, rel=0.02
    )


def test_what_a_plan_says(made):
    planned, _, _ = made
    assert planned.model == "tiny" and planned.mode == "train"
    assert (
        planned.num_devices == CORES
        and planned.fits
        and planned.memory.capacity is None
    )
    weights = 16 * 8 + CORES * 2 * 16 * 32 + 16 * 4 + 4
    assert planned.parameters == weights
    assert planned.state_bytes("weight") == 4 * weights
    # Adam's two slots, its step and its learning rate.
    assert planned.state_bytes("optimizer") == 2 * 4 * weights + 8 + 4
    experts = [w for w in planned.weights if "experts" in w.path]
    assert len(experts) == 6
    for weight in experts:
        assert weight.bytes == CORES * weight.bytes_per_core
        assert weight.layout[0] == "expert"
    # Two forward and one backward: nothing before the layer wants a gradient.
    assert planned.count("all-to-all", "tiny/moe") == 3
    assert planned.count("all-to-all") == 3 and planned.count("all-gather") == 0
    assert planned.reshards == []
    # The dispatcher writes its maps twice, and XLA makes them once.
    assert 0.8 < planned.flops_ratio < 1.01
    # The products of [C, M] x [M, H] in each group: two forward, two for the weights'
    # gradients, one for the hidden layer's. The CPU compiler drops some of their names.
    capacity = 2 * LENGTH // CORES
    product = 2 * CORES * capacity * DIM * 32
    assert sum(planned.flops_by_layer.values()) == planned.flops > 5 * product
    assert planned.flops_by_layer["tiny/moe/experts"] >= 2 * product
    assert planned.time is None  # a CPU has no roofline here
    assert planned.inputs == ["float32[8,8,16]", "float32[8,8,4]"]


def test_a_plan_survives_json(made):
    planned, _, _ = made
    assert gshard_tf.Plan.from_json(planned.to_json()) == planned
    with pytest.raises(ValueError, match="must be of format"):
        gshard_tf.Plan.from_json("{}")


def test_a_plan_of_the_same_program_is_not_made_again(made, monkeypatch):
    planned, folder, _ = made

    def compile_step(*args, **kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr(planner, "compile_step", compile_step)
    # Layers have the same names in each plan, whatever was built before.
    keras.layers.Dense(1), MoELayer(2, 2)
    again = gshard_tf.plan(moe_model, "cpu:8", batch=batch(), cache=folder)
    assert again == planned
    with pytest.raises(AssertionError, match="compiled again"):
        gshard_tf.plan(moe_model, "cpu:8", batch=batch(16), cache=folder)
    # A broken file is no plan, and is made anew.
    (folder / f"{planned.key}.json").write_text("{")
    with (
        pytest.warns(UserWarning, match="is broken"),
        pytest.raises(AssertionError, match="compiled again"),
    ):
        gshard_tf.plan(moe_model, "cpu:8", batch=batch(), cache=folder)


def test_a_model_is_planned_like_the_function_that_makes_it(made):
    planned, _, _ = made
    keras.backend.clear_session(free_memory=False)
    model = moe_model()
    before = [np.array(w) for w in model.get_weights()]
    again = gshard_tf.plan(model, "cpu:8", batch=batch(), cache=False)
    assert again.communication == planned.communication
    # A layer built on its own calls its weights' slots otherwise.
    assert sorted(
        (w.role, w.rule, w.shape, w.bytes_per_core) for w in again.weights
    ) == sorted((w.role, w.rule, w.shape, w.bytes_per_core) for w in planned.weights)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_nothing_is_allocated():
    def build():
        sizes = (1000, 1000, 1, 1, 4096, 65536, 32)
        model = Transformer(*sizes, num_experts=512, moe_every=1, dropout=0.0)
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
        return model

    ids = tf.TensorSpec([8, 16], tf.int32)
    planned = gshard_tf.plan(build, "cpu:8", batch=((ids, ids), ids), cache=False)
    assert planned.parameters > 500e9
    assert planned.state_bytes() > 6e12
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 16e9


@pytest.mark.parametrize("mode", ["evaluate", "predict"])
def test_steps_that_do_not_train(mode):
    inputs = batch() if mode == "evaluate" else (batch()[0],)
    planned = gshard_tf.plan(moe_model, "cpu:8", batch=inputs, mode=mode, cache=False)
    assert planned.mode == mode
    assert planned.count("all-to-all") == 2
    assert all(w.role != "optimizer" or w.bytes <= 8 for w in planned.weights) or (
        planned.state_bytes("optimizer") > 0
    )


def test_the_users_own_train_step_is_planned():
    class Twice(keras.Model):
        def __init__(self):
            super().__init__(name="twice")
            self.dense = keras.layers.Dense(8)

        def call(self, x):
            return self.dense(x)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x) + self(2 * x) - y))
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            return {"loss": loss}

    def build():
        model = Twice()
        model.compile("sgd", "mse")
        return model

    x = tf.TensorSpec([16, 8], tf.float32)
    planned = gshard_tf.plan(build, "cpu:2", batch=(x, x), cache=False)
    # Two forward products, and their gradients with respect to the weights.
    assert planned.flops_as_written * 2 == 4 * 2 * 16 * 8 * 8


def test_a_reshard_that_nobody_asked_for_is_named():
    class Shuffle(keras.layers.Layer):
        def call(self, x):
            return tf.sort(x, axis=0)  # needs all examples on every device

    def build():
        model = keras.Sequential([keras.layers.Dense(4), Shuffle(name="shuffle")])
        model.compile("sgd", "mse")
        return model

    x = tf.TensorSpec([64, 4], tf.float32)
    planned = gshard_tf.plan(build, "cpu:4", batch=(x, x), cache=False)
    assert planned.reshards
    found = planned.reshards[0]
    assert found.axis == "expert" and found.bytes > 0
    assert "annotate" in found.advice
    assert any("shuffle" in r.layer for r in planned.reshards)


def test_weights_spread_over_the_data_axis():
    def build():
        model = keras.Sequential([keras.layers.Dense(256), keras.layers.Dense(8)])
        model.compile("adam", "mse")
        return model

    x = tf.TensorSpec([16, 64], tf.float32)
    y = tf.TensorSpec([16, 8], tf.float32)
    found = {}
    for name in (None, "zero", "fsdp"):
        rules = gshard_tf.AxisRules(
            {"batch": "data"}, fsdp_min_bytes=4096, **({name: "data"} if name else {})
        )
        planned = gshard_tf.plan(
            build, "cpu:4", {"data": 4}, rules, (x, y), cache=False
        )
        assert planned.reshards == []
        found[name] = (
            planned.state_bytes("weight", per_core=True),
            planned.state_bytes("optimizer", per_core=True),
            planned.count("all-gather"),
        )
    whole = 4 * (64 * 256 + 256 * 8)
    small = 4 * (256 + 8)
    assert found[None] == (whole + small, 2 * (whole + small) + 12, 0)
    assert found["zero"] == (whole + small, 2 * (whole // 4 + small) + 12, 2)
    assert found["fsdp"] == (whole // 4 + small, 2 * (whole // 4 + small) + 12, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 2},
        {"use_ema": True, "ema_overwrite_frequency": 2},
    ],
)
def test_what_assigns_in_a_condition_is_refused(arguments):
    def build():
        model = keras.Sequential([keras.layers.Dense(2)])
        model.compile(keras.optimizers.SGD(**arguments), "mse")
        return model

    x = tf.TensorSpec([8, 2], tf.float32)
    with pytest.raises(ValueError, match=r"inside tf\.cond"):
        gshard_tf.plan(build, "cpu:2", batch=(x, x), cache=False)


def test_a_batch_that_does_not_divide_is_told():
    lines = []
    result = gshard_tf.plan(
        moe_model, "cpu:8", batch=batch(10), cache=False, progress=lines.append
    )
    [complaint] = [text for text in result.complaints if "batch" in text]
    assert "all of it: 10 over the 8 devices of 'expert', where 8 or 16" in complaint
    assert lines[0] == "building and tracing ..."
    jaxlib = result.versions["jaxlib"]
    assert re.fullmatch(
        rf"traced in .* s; compiling with jaxlib {jaxlib} ...", lines[1]
    )
    assert f"compiled by jaxlib {jaxlib} in" in " ".join(str(result).split())


def test_bad_arguments_say_what_would_be_right():
    x, y = batch()

    def planned(build=moe_model, topology="cpu:8", **arguments):
        return gshard_tf.plan(
            build, topology, **{"batch": (x, y), "cache": False, **arguments}
        )

    with pytest.raises(ValueError, match="`mode` must be one of"):
        planned(mode="fit")
    with pytest.raises(ValueError, match="needs the batch"):
        planned(batch=None)
    with pytest.raises(ValueError, match="every dimension"):
        planned(batch=(tf.TensorSpec([None, 4]), y))
    with pytest.raises(ValueError, match="cpu:8 has 8"):
        planned(mesh={"data": 3})
    with pytest.raises(ValueError, match="v4:2x2x2, v5e:2x2, .*Is it v5p"):
        planned(topology="v5:2x2")
    with pytest.raises(ValueError, match="v6e:2x4, tpu7x:2x2x2. Received"):
        planned(topology="fpga:2x4")
    with pytest.raises(ValueError, match="topology='cpu:none'"):
        planned(topology="cpu:none")
    with pytest.raises(ValueError, match="function that creates one"):
        planned(build="model")
    with pytest.raises(ValueError, match="must return the keras.Model"):
        planned(build=lambda: 3)
    with pytest.raises(ValueError, match="created before"):
        made = moe_model()
        planned(build=lambda: made)

    def uncompiled():
        return keras.Sequential([keras.Input((LENGTH, DIM)), keras.layers.Dense(4)])

    with pytest.raises(ValueError, match="needs a compiled model"):
        planned(build=uncompiled)


def test_a_function_that_takes_the_scope_away_is_told():
    def build():
        keras.backend.clear_session(free_memory=False)
        return moe_model()

    with pytest.raises(ValueError, match="must not call keras.backend.clear_session"):
        gshard_tf.plan(build, "cpu:8", batch=batch(), cache=False)


def test_a_sum_of_all_gradients_is_divided_among_the_layers():
    """On 8 devices, a batch in 8 parts: one all-reduce, of each gradient in float32."""

    def build():
        model = keras.Sequential(
            [keras.layers.Input([64])]
            + [keras.layers.Dense(128, name="one"), keras.layers.Dense(32, name="two")]
            + [keras.layers.Dense(1, name="three")],
            name="small",
        )
        model.compile("adam", "mse")
        return model

    batch = (tf.TensorSpec([64, 64]), tf.TensorSpec([64, 1]))
    rules = gshard_tf.AxisRules({"batch": "data"})
    plan = gshard_tf.plan(build, "cpu:8", {"data": 8}, rules, batch, cache=False)
    sums = {c.layer: c for c in plan.communication if c.kind == "all-reduce"}
    assert {layer: c.bytes for layer, c in sums.items()} == {
        "small/one": 4 * (64 * 128 + 128),
        "small/two": 4 * (128 * 32 + 32),
        "small/three": 4 * (32 + 1),
        "": 4,  # the loss
    }
    # XLA's own number: it combines them.
    assert plan.count("all-reduce") == sum(c.count for c in sums.values()) == 1
    assert sums["small/one"].count == 1
    assert [c.shared for c in sums.values()].count(1) == 3
    assert re.search(r"small/two +0\+1 +16.5 kB", str(plan))


class RowParallel(keras.layers.Layer):
    """x @ w, whose contracted dimension each device has a part of."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 32), name="w")
        gshard_tf.name_axes(self.w, ("mlp", None))

    def call(self, x):
        import jax

        def part(x, w):
            return jax.lax.psum(x @ w, gshard_tf.mesh_axis("mlp"))

        axes = [("batch", "mlp"), ("mlp", None)]
        return gshard_tf.manual(part, axes, ("batch", None))(x, self.w)


def test_a_manual_region_is_written_for_one_device():
    def build():
        x = keras.Input(batch_shape=(16, 64))
        y = keras.layers.Dense(8, use_bias=False)(RowParallel()(x))
        model = keras.Model(x, y)
        model.compile("sgd", "mse")
        return model

    rules = gshard_tf.AxisRules({"batch": "data", "mlp": "model"})
    mesh = {"data": 2, "model": 4}
    x, y = tf.TensorSpec([16, 64]), tf.TensorSpec([16, 8])
    plan = gshard_tf.plan(build, "cpu:8", mesh, rules, x, "predict", cache=False)
    part = 2 * (16 // 2) * (64 // 4) * 32  # on each device
    dense = 2 * 16 * 32 * 8  # of all of them
    assert plan.flops_as_written == part + dense / 8
    assert plan.flops == part + dense / 2  # the rules split the batch alone
    plan = gshard_tf.plan(build, "cpu:8", mesh, rules, (x, y), cache=False)
    # The gradients of x and w, and of the Dense layer's input and kernel.
    assert plan.flops_as_written == 3 * part + 3 * dense / 8


@pytest.mark.parametrize("of_mesh", [True, False])
def test_keras_s_own_mesh_and_layout_map(of_mesh):
    """A plan has the layouts that `SpmdStrategy` gives, which jax's are compared to."""
    devices = [f"cpu:{i}" for i in range(8)]
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[".*up/kernel"] = (None, "model")
    layout_map[".*down/kernel"] = ("model", None)

    def build():
        layers = [keras.layers.Dense(16, name="up"), keras.layers.Dense(4, name="down")]
        model = keras.Sequential([keras.layers.Input([8]), *layers])
        model.compile("sgd", "mse")
        return model

    batch = (tf.TensorSpec([16, 8]), tf.TensorSpec([16, 4]))
    plan = gshard_tf.plan(
        build, "cpu:8", mesh if of_mesh else None, layout_map, batch, cache=False
    )
    assert plan.mesh == {"batch": 2, "model": 4}
    layouts = {w.path.partition("/")[2]: w.layout for w in plan.weights}
    assert layouts["up/kernel"] == (None, "model")
    assert layouts["down/kernel"] == ("model", None)
    assert layouts["up/bias"] == (None,)
    # The batch over 2, the hidden layer over 4: one sum of [8, 4] over `model`.
    sums = {(c.axis, c.bytes) for c in plan.communication if c.kind == "all-reduce"}
    assert ("model", 4 * 8 * 4) in sums
    strategy = gshard_tf.SpmdStrategy(mesh, layout_map)
    with strategy.scope():
        model = build()
    described = {
        row.path.partition("/")[2]: row for row in strategy.describe(model).rows
    }
    for path in ("up/kernel", "down/kernel", "up/bias"):
        assert described[path].layout == layouts[path]
