"""The layers in a partitioned program: what it communicates, and that it is right."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

import gshard_tf
from keras_layers import Dropout, MoELayer, Transformer


def fit(model, inputs, targets, steps):
    """Losses and metrics of each step."""
    return model.fit(
        inputs, targets, batch_size=len(targets), epochs=steps, verbose=0, shuffle=False
    ).history


def train_plain(make_model, inputs, targets, loss, steps):
    """The same by Keras alone, operation by operation."""
    keras.utils.set_random_seed(0)
    model = make_model()
    model.compile(keras.optimizers.SGD(0.1), loss, run_eagerly=True)
    return fit(model, inputs, targets, steps)


def train(make_model, inputs, targets, loss, devices, steps):
    """What `fit` returns, on a mesh, and the collectives of the step."""
    keras.utils.set_random_seed(0)
    axes = devices if isinstance(devices, dict) else {"expert": devices}
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh(axes))
    with strategy.scope():
        model = make_model()
        model.compile(keras.optimizers.SGD(0.1), loss)
    history = fit(model, inputs, targets, steps)
    (program,) = strategy.programs
    return history, program.collectives()


def check_same(one, many):
    assert one.keys() == many.keys()
    for name, values in one.items():
        np.testing.assert_allclose(values, many[name], rtol=1e-4, err_msg=name)


@pytest.mark.broad(2)
@pytest.mark.parametrize("dispatcher", ["index", "einsum"])
def test_moe_layer_costs_two_all_to_alls_each_way(dispatcher):
    x = np.random.default_rng(0).normal(size=(8, 16, 32)).astype(np.float32)
    x[:, 12:] = 0.0  # padding, for a mask

    def make():
        return keras.Sequential(
            [
                keras.layers.Masking(),
                keras.layers.Dense(32),
                Dropout(0.1, seed=2),
                MoELayer(8, 64, dispatcher=dispatcher, seed=1, name="moe"),
                keras.layers.Dense(32),
            ]
        )

    history, found = train(make, x, x, "mse", 4, 2)
    kinds = collections.Counter(collective.kind for collective in found)
    assert kinds["all-to-all"] == 4
    assert set(kinds) == {"all-to-all", "all-reduce"}
    # Not the experts' weights or gradients: their devices differ, and each holds
    # all that it needs. Only weights that every device has, losses and counts.
    shared = 4 * (2 * (32 * 32 + 32) + 32 * 8)
    reduced = sum(c.bytes for c in found if c.kind == "all-reduce")
    assert shared <= reduced < shared + 200
    if dispatcher == "index":  # that both are the same is tested in test_dispatch
        check_same(train_plain(make, x, x, "mse", 2), history)


ROUTERS = {
    "switch": {"kind": "top_k", "k": 1, "capacity_factor": 1.25, "jitter": 0.1},
    "prioritized": {"kind": "top_k", "batch_prioritized": True, "capacity_factor": 1.0},
    "bias": {"kind": "top_k", "bias_update_rate": 0.01, "scores": "sigmoid"},
    "sampling": {"second_expert_policy": "sampling"},
    "expert_choice": {"kind": "expert_choice"},
}
ONE, TWO = {"expert": 8}, {"data": 4, "model": 2}


@pytest.mark.broad(8)
@pytest.mark.parametrize(
    ("router", "experts", "axes", "dispatcher"),
    [
        *((router, 8, TWO, "index") for router in ROUTERS),
        ("expert_choice", 8, TWO, "einsum"),
        # Fewer and more experts than devices.
        ("switch", 4, ONE, "index"),
        ("switch", 16, ONE, "index"),
    ],
)
def test_every_router_on_every_mesh(router, experts, axes, dispatcher):
    x = np.random.default_rng(0).normal(size=(8, 16, 32)).astype(np.float32)
    x[:, 12:] = 0.0  # padding, for a mask

    def make():
        options = {"gated": True, "num_shared_experts": 1, "z_loss_coef": 0.01}
        return keras.Sequential(
            [
                keras.layers.Masking(),
                keras.layers.Dense(32),
                MoELayer(
                    experts,
                    64,
                    router=ROUTERS[router],
                    dispatcher=dispatcher,
                    router_metrics="all",
                    seed=1,
                    name="moe",
                    **options,
                ),
            ]
        )

    history, found = train(make, x, x, "mse", axes, 2)
    kinds = collections.Counter(collective.kind for collective in found)
    assert kinds["all-to-all"] == 4
    assert set(kinds) == {"all-to-all", "all-reduce"}
    check_same(train_plain(make, x, x, "mse", 2), history)


@pytest.mark.slow  # as the layers that it has, see above
def test_transformer_moves_only_tokens_of_experts():
    rng = np.random.default_rng(0)
    source, target = rng.integers(3, 20, (2, 8, 8))
    source[:4, 6:] = target[:4, 5:] = 0

    def make():
        return Transformer(
            24, 24, 1, 1, 32, 64, 4, num_experts=8, moe_every=1, dropout=0.0, seed=1
        )

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    history, found = train(make, (source, target), target, loss, 4, 2)
    kinds = collections.Counter(collective.kind for collective in found)
    assert kinds["all-to-all"] == 8
    assert set(kinds) == {"all-to-all", "all-reduce"}
    check_same(train_plain(make, (source, target), target, loss, 2), history)


def test_annotations_name_no_mesh_axis_twice_on_two_dimensional_meshes():
    mesh = gshard_tf.create_mesh({"expert": 4, "model": 2})
    x = tf.ones([4, 8, 16])
    layer = MoELayer(4, 8)
    layer(x)
    rules = gshard_tf.AxisRules.default(mesh)
    with gshard_tf.use_mesh(mesh, rules):
        tf.function(lambda x: layer(x, training=True)).get_concrete_function(x)
