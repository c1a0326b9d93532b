"""The same thing done in plain Keras and on a mesh, and the difference."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import gshard_tf

RTOL = 1e-4


class Experts(keras.layers.Layer):
    """`[B, E, M]` -> the same: token `e` of each example goes to expert `e`."""

    def __init__(self, experts=8, width=6, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.experts = experts
        self.width = width
        self.dropout = dropout
        self.seeds = keras.random.SeedGenerator(11)

    def build(self, shape):
        def weight(name, *shape_and_axes):
            shape, axes = shape_and_axes
            weight = self.add_weight(shape=shape, name=name)
            gshard_tf.name_axes(weight, axes)
            return weight

        e, m, h = self.experts, shape[-1], self.width
        self.wi = weight("wi", (e, m, h), ("expert", "embed", "mlp"))
        self.wo = weight("wo", (e, h, m), ("expert", "mlp", "embed"))

    def call(self, x, training=False):
        x = gshard_tf.annotate(x, ("batch", None, None))
        h = tf.einsum("bem,emh->beh", x, tf.cast(self.wi, x.dtype))
        h = gshard_tf.annotate(tf.tanh(h), (None, "expert", "mlp"))
        if training and self.dropout:
            shape = [tf.shape(h)[0], h.shape[1], h.shape[2]]
            u = gshard_tf.random.uniform(self.seeds.next(), shape)
            h = tf.where(u < self.dropout, tf.zeros_like(h), h / (1.0 - self.dropout))
        y = tf.einsum("beh,ehm->bem", h, tf.cast(self.wo, x.dtype))
        return x + gshard_tf.annotate(y, ("batch", None, None))

    def get_config(self):
        config = {
            "experts": self.experts,
            "width": self.width,
            "dropout": self.dropout,
        }
        return {**super().get_config(), **config}


def data(examples=36, classes=3, seed=0):
    """Inputs `[N, 8, 4]` and labels `[N]`; 36 is no multiple of 8 nor of 16."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=[examples, 8, 4]).astype("float32")
    y = rng.integers(0, classes, size=[examples]).astype("int32")
    return x, y


def classifier(dropout=0.0, classes=3):
    """A model with experts, for `data`; not compiled."""
    return keras.Sequential(
        [
            keras.layers.Input([8, 4]),
            Experts(dropout=dropout),
            keras.layers.Flatten(),
            keras.layers.Dense(classes),
        ]
    )


def compiled(optimizer="adam", **kwargs):
    model = classifier()
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **kwargs,
    )
    return model


@dataclasses.dataclass
class Run:
    """What came of a run: the model, what `use` returned, and the strategy."""

    model: keras.Model
    result: Any
    strategy: gshard_tf.SpmdStrategy | None = None


def strategy_of(mesh: int | dict[str, int] = 8, **kwargs) -> gshard_tf.SpmdStrategy:
    axes = {"expert": mesh} if isinstance(mesh, int) else mesh
    return gshard_tf.SpmdStrategy(gshard_tf.create_mesh(axes), **kwargs)


def run_plain(make: Callable, use: Callable) -> Run:
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    model = make()
    if model.jit_compile and getattr(model, "compiled", False):
        # Operation by operation: quicker to start, and further from what we do.
        model.jit_compile = False
    build_optimizer(model)
    return Run(model, use(model))


def build_optimizer(model: keras.Model) -> None:
    """Makes the slots, which a first step would make in a trace that is thrown away."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and getattr(model, "built", False):
        optimizer.build(model.trainable_variables)


def run_on_mesh(make: Callable, use: Callable, mesh=8, **kwargs) -> Run:
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    strategy = strategy_of(mesh, **kwargs)
    with strategy.scope():
        model = make()
    return Run(model, use(model), strategy)


def assert_equal_runs(make: Callable, use: Callable, mesh=8, rtol=RTOL, **kwargs):
    """`use(make())` gives the same on a mesh, and leaves the same state behind."""
    plain = run_plain(make, use)
    meshed = run_on_mesh(make, use, mesh, **kwargs)
    assert_close(meshed.result, plain.result, rtol, "result")
    assert_same_state(meshed.model, plain.model, rtol)
    assert meshed.strategy.programs, "nothing ran on the mesh"
    return plain, meshed


def state(model: keras.Model) -> dict[str, np.ndarray]:
    """Every variable of a model, its metrics and its optimizer."""
    variables = list(model.variables) + list(model.metrics_variables)
    if getattr(model, "optimizer", None) is not None:
        variables += model.optimizer.variables
    # By place and name. (Keras gives Adafactor's placeholders another path when it
    # builds the optimizer for a strategy.)
    return {f"{i} {v.name}": v.numpy() for i, v in enumerate(variables)}


def assert_same_state(model: keras.Model, other: keras.Model, rtol: float = RTOL):
    ours, theirs = state(model), state(other)
    assert list(ours) == list(theirs)
    assert_close(ours, theirs, rtol, "state")


def relative_difference(a: Any, b: Any) -> float:
    """Largest difference of two arrays, relative to the largest value of `b`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
    if not a.size or np.array_equal(a, b, equal_nan=True):
        return 0.0
    return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30))


def assert_close(ours: Any, theirs: Any, rtol: float, what: str) -> None:
    if isinstance(theirs, keras.callbacks.History):
        ours, theirs = ours.history, theirs.history
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key in theirs:
            assert_close(ours[key], theirs[key], rtol, f"{what}[{key!r}]")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(a, b, rtol, f"{what}[{i}]")
    elif theirs is None or isinstance(theirs, str):
        assert ours == theirs
    else:
        difference = relative_difference(ours, theirs)
        assert difference <= rtol, f"{what}: {difference:.3g}\n{ours}\n{theirs}"


def assert_same_saved(model, other):
    """What a file keeps: weights and slots, not metrics."""
    for ours, theirs in zip(
        model.variables + model.optimizer.variables,
        other.variables + other.optimizer.variables,
        strict=True,
    ):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=ours.path)
