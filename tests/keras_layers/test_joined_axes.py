"""Rules that split a dimension over several mesh axes: equal to one device."""

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from jax.sharding import PartitionSpec

import gshard_tf
from gshard_tf.hlo.flops import flops_by_operation
from gshard_tf.hlo.parser import parse
from gshard_tf.layouts.partition_spec import axes_of, parts_over
from gshard_tf.sharding import op_sharding
from gshard_tf.sharding.mesh import use_mesh
from gshard_tf.sharding.mesh_layout import MeshLayout
from keras_layers import MoELayer, MultiHeadAttention

CUBE = {"data": 2, "x": 2, "y": 2}
ALL = ("data", "x", "y")


def data(examples=16, length=8, width=16):
    x = np.random.default_rng(0).normal(size=(examples, length, width))
    return x.astype("float32")


def with_experts(**kwargs):
    """A model whose experts' inputs need a gradient too, compiled."""
    x = inputs = keras.Input((8, 16))
    x = keras.layers.Dense(16, name="first")(x)
    x = x + MoELayer(**{"num_experts": 8, "hidden_dim": 32, **kwargs}, name="moe")(x)
    model = keras.Model(inputs, keras.layers.Dense(16, name="last")(x))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


def fit(model):
    x = data()
    return model.fit(x, x, batch_size=16, epochs=3, verbose=0, shuffle=False)


def kinds(strategy):
    """The collectives of the last program, but those of scalars and small sums."""
    found = strategy.programs[-1].collectives()
    return sorted(c.kind for c in found if c.kind != "all-reduce")


@pytest.mark.parametrize(
    ("tokens", "experts", "width"),
    [
        (ALL, ("x", "y"), None),
        pytest.param(("x", "y"), ("y", "x"), "data", marks=pytest.mark.slow),
        pytest.param(ALL, ALL, None, marks=pytest.mark.slow),
    ],
)
def test_experts_over_two_axes(tokens, experts, width):
    rules = gshard_tf.AxisRules(
        {"batch": tokens, "group": tokens, "expert": experts, "mlp": width}
    )
    _, meshed = parity.assert_equal_runs(
        with_experts, fit, CUBE, rtol=1e-5, rules=rules
    )
    rows = {row.path: row for row in meshed.strategy.describe(meshed.model).rows}
    stored = rows["moe/experts/wi"]
    assert stored.layout == ("+".join(experts), None, width)
    assert stored.bytes_per_device * 2 ** (len(experts) + bool(width)) == stored.bytes
    # As the compiled program has it, not as it was asked for.
    held = {path: own for path, _, own in meshed.strategy.programs[-1].argument_bytes()}
    assert held["moe/experts/wi"] == stored.bytes_per_device
    slot = next(row for path, row in rows.items() if "experts_wi" in path)
    assert slot.layout == stored.layout


def test_fewer_experts_than_devices_compute_nothing_twice():
    """Devices that share an expert share its groups, and exchange among themselves."""
    rules = gshard_tf.AxisRules({"batch": ALL, "group": ALL, "expert": ("x", "y")})
    _, meshed = parity.assert_equal_runs(
        lambda: with_experts(num_experts=4), fit, CUBE, 1e-5, rules=rules
    )
    assert kinds(meshed.strategy) == ["all-to-all"] * 4
    compiled = parse(meshed.strategy.programs[-1].compiled.as_text())
    flops = sum(flops_by_operation(compiled).values())
    # An eighth of 128 tokens, 2 slots for each, by two matrices, forward and backward;
    # and of what is around the experts: two dense layers and the router.
    tokens, m, h, e = 16 * 8 / 8, 16, 32, 4
    around = (2 + 3) * m * m + 3 * m * e
    expected = 2 * tokens * (3 * 2 * 2 * m * h + around)
    assert expected <= flops < 1.02 * expected


@pytest.mark.slow
def test_groups_and_experts_over_different_axes_gather_only_results():
    rules = gshard_tf.AxisRules({"batch": "data", "group": "data", "expert": "x"})
    _, meshed = parity.assert_equal_runs(
        with_experts, fit, {"data": 4, "x": 2}, 1e-5, rules=rules
    )
    # What the experts give, and its gradient's way back to the tokens.
    assert kinds(meshed.strategy) == ["all-gather"] * 2


def test_inputs_and_outputs_split_by_examples_and_length():
    rules = gshard_tf.AxisRules(
        {"batch": ("data", "x"), "length": "y"}, batch_axes=("batch", "length")
    )

    def make():
        model = keras.Sequential([keras.Input((8, 16)), keras.layers.Dense(4)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    def use(model):
        x, y = data(), data(width=4)
        weights = np.linspace(0, 1, 16, dtype="float32")
        logs = model.fit(x, y, 8, sample_weight=weights, verbose=0, shuffle=False)
        evaluated = model.evaluate(x, y, 8, sample_weight=weights, verbose=0)
        # The last batch does not divide.
        return [logs, evaluated, model.predict(x[:14], 8, verbose=0)]

    _, meshed = parity.assert_equal_runs(make, use, CUBE, 1e-5, rules=rules)
    specs = [
        [s.spec for s in program.input_shardings]
        for program in meshed.strategy.programs
    ]
    both, one = PartitionSpec(("data", "x"), "y", None), PartitionSpec(("data", "x"))
    assert specs[:3] == [[both, both, one], [both, both, one], [both]]
    assert specs[3] == [PartitionSpec(None, "y", None)]  # 6 of 4 devices
    outputs = meshed.strategy.programs[2].layouts.outputs
    assert [layout.spec for layout in outputs] == [("data+x", "y", None)]


MESHES = (CUBE, {"data": 2, "x": 4}, {"x": 3, "y": 2}, {"data": 4, "x": 1, "y": 2})


def random_rules(rng, names):
    """Rules of a model with attention and experts, and other options of theirs."""

    def some(taken=()):
        free = [name for name in names if name not in taken]
        return tuple(rng.permutation(free)[: rng.integers(0, len(free) + 1)].tolist())

    tokens, experts = some(), some()
    rules = {
        "batch": tokens,
        "group": tokens,
        "expert": experts,
        "mlp": some(experts),
        "heads": some(tokens),
    }
    options = {"fsdp_min_bytes": 1}
    if tokens and rng.random() < 0.7:
        options[rng.choice(["fsdp", "zero"])] = tokens
    length = some(tokens)
    if rng.random() < 0.5 and length:
        rules["at"] = length
        options["batch_axes"] = ("batch", "at")
    return gshard_tf.AxisRules({k: v for k, v in rules.items() if v}, **options)


@pytest.mark.filterwarnings("ignore:.*(divide|matched no)")
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 30))]
)
def test_any_rules_on_any_mesh(seed):
    """Uneven dimensions too: 6 heads, 6 experts, and 12 examples."""
    rng = np.random.default_rng(seed)
    mesh = MESHES[rng.integers(len(MESHES))]
    rules = random_rules(rng, list(mesh))
    dispatcher = ["index", "einsum", "dropless"][rng.integers(3)]
    rows, width = (axes_of(rules.mesh_axis(name)) for name in ("group", "mlp"))
    uneven = 6 % parts_over(rules.mesh_axis("expert"), mesh)
    if dispatcher == "dropless" and (uneven or set(rows) & set(width)):
        dispatcher = "index"  # "dropless" refuses both

    def make():
        x = inputs = keras.Input((8, 16))
        x = x + MultiHeadAttention(6, 4, seed=1)(x)
        moe = MoELayer(6, 24, dispatcher=dispatcher, router={"k": 2, "kind": "top_k"})
        model = keras.Model(inputs, keras.layers.Dense(16)(x + moe(x)))
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        return model

    def use(model):
        x = data(12)
        return [
            model.fit(x, x, 12, epochs=2, verbose=0, shuffle=False),
            model.predict(x, 12, verbose=0),
        ]

    parity.assert_equal_runs(make, use, mesh, 1e-5, rules=rules)


def test_a_checkpoint_of_joined_axes_is_read_on_another_mesh(tmp_path):
    joined = gshard_tf.AxisRules(
        {"batch": ALL, "group": ALL, "expert": ("y", "x")},
        zero=("data", "x"),
        fsdp_min_bytes=1,
    )
    checkpoints = gshard_tf.CheckpointManager(tmp_path, asynchronous=False)
    saved = parity.run_on_mesh(with_experts, fit, CUBE, rules=joined, host_copy_bytes=0)
    checkpoints.save(gshard_tf.training_state(saved.model), 1)
    other = gshard_tf.AxisRules({"batch": "a", "group": "a", "expert": ("a", "b")})

    def with_slots():
        model = with_experts()
        parity.build_optimizer(model)
        return model

    mesh = {"a": 4, "b": 2}
    read = parity.run_on_mesh(with_slots, lambda model: None, mesh, rules=other)
    checkpoints.restore(gshard_tf.training_state(read.model))
    parity.assert_same_saved(read.model, saved.model)


def test_shard_by_a_partition_spec():
    strategy = parity.strategy_of(CUBE, rules=gshard_tf.AxisRules({}))
    x = np.arange(64, dtype="float32").reshape(8, 8)

    @tf.function
    def step(x):
        return gshard_tf.shard(2.0 * x, (("y", "data"), None))

    np.testing.assert_array_equal(strategy.run(step, (x,)), 2 * x)
    with use_mesh(strategy.mesh, strategy.rules):
        graph = step.get_concrete_function(tf.TensorSpec([8, 8])).graph
    (found,) = (op for op in graph.get_operations() if op.type == "XlaSharding")
    layout = MeshLayout(("y+data", None), strategy.mesh)
    assert found.get_attr("_XlaSharding") == op_sharding.from_layout(layout)
    for spec in [(("y", "y"), None), ("z", None), ("y",)]:
        with pytest.raises(ValueError, match="A partition spec must"):
            strategy.run(tf.function(lambda x, s=spec: gshard_tf.shard(x, s)), (x,))
    assert gshard_tf.shard(x, ("y", None)) is x
