"""Names that do not depend on what else a process has made."""

import keras
import parity
import pytest

import gshard_tf


def made(optimizer):
    model = keras.Sequential(
        [
            keras.layers.Input([4]),
            keras.layers.Dense(4),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(4),
            keras.layers.Dense(2, name="head_7"),
        ]
    )
    model.compile(optimizer(), "mse", metrics=["mae"])
    return model


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.Adam,
        keras.optimizers.Adafactor,
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(momentum=0.9)),
    ],
    ids=["adam", "adafactor", "loss scale"],
)
def test_names_are_the_same_wherever_a_model_is_made(optimizer):
    model, second = made(optimizer), made(optimizer)
    first = gshard_tf.training_state(model)
    with parity.strategy_of(2).scope():
        meshed = made(optimizer)
    assert second.layers[0].path != model.layers[0].path
    for other in (second, meshed):
        names = gshard_tf.training_state(other)
        assert list(names) == list(first)
        for name, variable in names.items():
            assert tuple(variable.shape) == tuple(first[name].shape), name


def test_what_is_in_it():
    model = made(keras.optimizers.Adam)
    names = gshard_tf.training_state(model)
    ids = {id(v) for v in names.values()}
    for variable in [*model.variables, *model.optimizer.variables]:
        assert id(variable) in ids
    keras.backend.clear_session(free_memory=False)
    names = list(gshard_tf.training_state(made(keras.optimizers.Adam)))
    assert names[:2] == ["model/sequential/dense/kernel", "model/sequential/dense/bias"]
    assert "model/sequential/head/kernel" in names
    assert "optimizer/sequential/dense_1/kernel/momentum" in names
    assert "optimizer/iteration" in names
    assert any("seed" in name for name in names)


def test_extra_state():
    model = made(keras.optimizers.Adam)
    other = keras.optimizers.SGD(momentum=0.9)
    other.build(model.trainable_variables)
    names = gshard_tf.training_state(model, {"second": other})
    assert "extra/second/iteration" in names


class Scaled(keras.layers.Layer):
    """Two weights, of which one's name begins like the other's."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=[shape[-1]], name="kernel")
        self.scale = self.add_weight(shape=[shape[-1]], name="kernel_scale")

    def call(self, x):
        return x * self.kernel * self.scale


def test_slots_go_by_the_whole_name_of_their_weight():
    model = keras.Sequential([keras.layers.Input([4]), Scaled(name="scaled")])
    model.compile("adam", "mse")
    names = gshard_tf.training_state(model)
    slots = {n for n in names if n.startswith("optimizer/sequential/")}
    assert slots == {
        f"optimizer/sequential/scaled/{weight}/{slot}"
        for weight in ("kernel", "kernel_scale")
        for slot in ("momentum", "velocity")
    }


class Twins(keras.layers.Layer):
    """Keras does not mind two weights of one name."""

    def build(self, shape):
        self.pair = [self.add_weight(shape=[shape[-1]], name="w") for _ in range(2)]

    def call(self, x):
        return x * self.pair[0] + self.pair[1]


def test_weights_of_one_name_are_told_apart():
    model = keras.Sequential([keras.layers.Input([4]), Twins(name="twins")])
    names = gshard_tf.training_state(model)
    first, second = model.layers[0].pair
    assert names["model/sequential/twins/w"] is first
    assert names["model/sequential/twins/w#2"] is second
