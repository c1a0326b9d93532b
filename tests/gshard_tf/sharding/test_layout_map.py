"""A `LayoutMap` of Keras: the layouts of `ModelParallel` on jax, one device's numbers.

The model is of plain Keras. `test_layout_map_backbones.py` has keras-hub's.
"""

import json

import keras
import numpy as np
import parity
import pytest
from installed_versions import KERAS
from processes import run_python

import gshard_tf
from gshard_tf.sharding.neighbors import splits_against_neighbors

# Also run by a process whose Keras is on jax.
MODEL = """
import inspect
import keras

def make_map(shape=(2, 2)):
    devices = [f"cpu:{i}" for i in range(shape[0] * shape[1])]
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map["table/embeddings"] = ("model", "batch")
    layout_map[".*attention/(query|key|value)/kernel"] = (None, "model")  # of 3
    layout_map[".*attention_output/kernel"] = ("model", None, None)
    layout_map[".*up/kernel"] = (None, "model")
    layout_map[".*up/bias"] = ("model",)
    layout_map[".*down/kernel"] = ("model", None)
    return layout_map

# Of no weight, and slots are as their weights. In an older Keras the name is "SGD".
# (An SGD made here would take the name of the model's.)
DEFAULT = inspect.signature(keras.optimizers.SGD).parameters["name"].default
SLOT = f"{DEFAULT or 'sgd'}/up_kernel_momentum"

def make_model():
    tokens = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(32, 8, name="table")(tokens)
    attention = keras.layers.MultiHeadAttention(4, 2, use_bias=False, name="attention")
    x = x + attention(x, x)
    y = keras.layers.Dense(24, activation="relu", name="up")(x)
    x = x + keras.layers.Dense(8, name="down")(y)
    model = keras.Model(tokens, keras.layers.Dense(32, name="head")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Adam of plain Keras takes repeated rows of a look-up one by one (strategies.md).
    model.compile(keras.optimizers.SGD(0.5, momentum=0.9), loss)
    model.optimizer.build(model.trainable_variables)
    return model
"""
NAMES: dict = {}
exec(MODEL, NAMES)  # noqa: S102
make_map, make_model = NAMES["make_map"], NAMES["make_model"]


def on_mesh(layout_map, make=make_model):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    strategy = gshard_tf.SpmdStrategy(layout_map.device_mesh, layout_map)
    with strategy.scope():
        return strategy, make()


def test_layouts_are_those_of_model_parallel_on_jax():
    printed = run_python(
        MODEL
        + """
import json
layout_map = make_map()
layout_map[SLOT] = ("batch", None)
with keras.distribution.ModelParallel(layout_map=layout_map).scope():
    model = make_model()
variables = model.variables + model.optimizer.variables
specs = [(v.path, list(v.value.sharding.spec)) for v in variables]
print(json.dumps([(p, s + [None] * (len(v.shape) - len(s)))
                  for v, (p, s) in zip(variables, specs)]))
""",
        KERAS_BACKEND="jax",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    layout_map = make_map()
    layout_map[NAMES["SLOT"]] = ("batch", None)
    strategy, model = on_mesh(layout_map)
    ours = [[row.path, list(row.layout)] for row in strategy.describe(model).rows]
    assert ours == json.loads(printed)
    assert ["down/kernel", ["model", None]] in ours
    assert [NAMES["SLOT"], [None, "model"]] in ours


def test_trains_as_one_device():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 32, [16, 6]).astype("int32")

    def losses(model):
        fit = model.fit(x, x, batch_size=8, epochs=3, shuffle=False, verbose=0)
        return fit.history["loss"]

    plain = parity.run_plain(make_model, losses)
    strategy, model = on_mesh(make_map())
    np.testing.assert_allclose(losses(model), plain.result, rtol=1e-5)
    parity.assert_same_state(model, plain.model, 1e-4)
    report = strategy.describe(model)
    assert report.mesh == {"batch": 2, "model": 2}
    assert report.whole == ["head/kernel"]
    whole, neighbors = report.warnings
    assert whole == (
        "The layout map does not mention weights of two and more dimensions, which "
        "every device holds whole: 'head/kernel'."
    )
    assert neighbors == (
        "The dimension of 8 is split over 'batch' in 'table/embeddings', while 6 "
        "others leave it whole: 'attention/query/kernel' is the first. Each use then "
        "moves a tensor. The pattern's axes may be in the wrong order."
    )


def test_a_pattern_that_matches_nothing_and_two_that_match_one():
    layout_map = make_map()
    if KERAS >= (3, 15):  # in older ones a pattern may match a part of a path
        layout_map["up/kern"] = (None, "batch")
        strategy, model = on_mesh(layout_map)
        assert "The path pattern 'up/kern' matched no weight." in (
            strategy.describe(model).warnings
        )
    layout_map["up/.*"] = (None, "batch")
    strategy, model = on_mesh(layout_map)
    # Keras's own words.
    with pytest.raises(ValueError, match="'up/.*' matches multiple layout"):
        strategy.describe(model)
    # The path itself comes before any regular expression.
    layout_map = make_map()
    layout_map["up/kernel"] = ("batch", None)
    strategy, model = on_mesh(layout_map)
    layouts = {row.path: row for row in strategy.describe(model).rows}
    assert layouts["up/kernel"].layout == ("batch", None)
    assert layouts["up/kernel"].rule == "path 'up/kernel'"


def test_batches_are_split_over_the_first_axis_or_a_named_one():
    devices = [f"cpu:{i}" for i in range(4)]
    mesh = keras.distribution.DeviceMesh((4, 1), ("model", "data"), devices)
    layout_map = keras.distribution.LayoutMap(mesh)
    strategy = gshard_tf.SpmdStrategy(mesh, layout_map)
    assert strategy.rules.rules["batch"] == "model"
    rules = gshard_tf.LayoutMapRules(layout_map, batch_dim_name="data")
    assert gshard_tf.SpmdStrategy(mesh, rules).rules.rules["batch"] == "data"


def test_refuses_what_does_not_fit():
    layout_map = make_map()
    with pytest.raises(ValueError, match="an axis of the mesh, and 'batch' if one is"):
        gshard_tf.LayoutMapRules(layout_map, batch_dim_name="model")
    with pytest.raises(ValueError, match="must have a device mesh: LayoutMap"):
        gshard_tf.LayoutMapRules(keras.distribution.LayoutMap(None))
    mesh = gshard_tf.create_mesh({"batch": 4, "model": 2})
    with pytest.raises(ValueError, match="must be that of the layout map"):
        gshard_tf.SpmdStrategy(mesh, layout_map)
    for devices in (["cpu:1", "cpu:0"], ["cpu:0", "gpu:1"], ["a", "b"], [0, 1]):
        mesh = keras.distribution.DeviceMesh((2,), ("model",), devices)
        with pytest.raises(ValueError, match="of one type, from 0, in their order"):
            gshard_tf.SpmdStrategy(mesh)


def test_splits_against_neighbors():
    weights = {
        # keras-hub's map for Llama gives Gemma's order of axes to these.
        "0/query": ((64, 4, 16), ("model", "batch", None)),
        "0/output": ((4, 16, 64), ("model", None, "batch")),
        "0/up": ((64, 128), ("batch", "model")),
        "0/down": ((128, 64), ("model", "batch")),
        "0/square": ((64, 64), ("model", None)),
    }
    [width] = splits_against_neighbors(weights, {"batch": 2, "model": 2})
    assert width.startswith("The dimension of 64 is split over 'model' in '0/query', ")
    assert "while 3 others split it over 'batch': '0/output' is the first" in width
    del weights["0/query"]
    assert splits_against_neighbors(weights, {"batch": 2, "model": 2}) == []
