"""Puts a random program together, and prints it as a script."""

import dataclasses
import functools
import inspect
import re
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.fuzz import (
    array_ops,
    harness,
    keras_ops,
    layer_ops,
    loop_ops,
    math_ops,
    window_ops,
)
from benchmarks.fuzz.drawing import LARGEST, Draw

# What an expression of a case may say.
NAMESPACE = vars(harness)
# Elements that a result may have.
MOST = 4 * LARGEST
LAYERS = "layer_ops"


@dataclasses.dataclass
class Case:
    """One program.

    Attributes:
        seed: What it was drawn from.
        name: The operation that it is about.
        axes, rules, paths: Of the strategy.
        inputs: Name -> expression of its value.
        layers: Expressions of Keras layers.
        lines: The body of the function.
    """

    seed: int
    name: str
    axes: dict[str, int]
    rules: dict[str, str | tuple[str, ...]]
    paths: list[tuple[str, tuple]]
    inputs: dict[str, str]
    layers: list[str]
    lines: list[str]

    def script(self) -> str:
        """A program that prints what comes of the case; exit status 1: it is wrong."""
        body = "".join(f"    {line}\n" for line in self.lines)
        inputs = "".join(f"        {text},  # {n}\n" for n, text in self.inputs.items())
        layers = "".join(f"        {text},\n" for text in self.layers)
        return (
            f"# A case of the partition fuzzer: {self.name!r}, seed {self.seed}.\n"
            f"{_head()}\n\n"
            f"AXES = {self.axes}\nRULES = {self.rules}\nPATHS = {self.paths}\n\n\n"
            f"def make_inputs():\n    return [\n{inputs}    ]\n\n\n"
            f"def make_layers():\n    return [\n{layers}    ]\n\n\n"
            f"def function(layers, {', '.join(self.inputs)}):\n{body}    return h\n\n\n"
            'if __name__ == "__main__":\n'
            "    gshard_tf.request_cpu_devices(8)\n"
            "    inputs = make_inputs()\n"
            "    found = check(function, make_layers, inputs, AXES, RULES, PATHS)\n"
            "    print(found)\n"
            '    raise SystemExit(found["verdict"] in ("wrong", "error"))\n'
        )

    def program(self) -> dict[str, Any]:
        """The script's functions."""
        namespace: dict[str, Any] = {"__name__": "case"}
        exec(compile(self.script(), f"case-{self.seed}", "exec"), namespace)
        return namespace


@functools.cache
def _head() -> str:
    return inspect.getsource(harness)


@functools.cache
def tables() -> dict[str, dict]:
    """All operations, by kind."""
    modules = (array_ops, math_ops, window_ops, loop_ops, keras_ops, layer_ops)
    return {m.__name__.rpartition(".")[2]: m.operations.table for m in modules}


def names(only: str = "") -> list[str]:
    """`kind: operation` of all operations whose name has one of the texts `a|b|c`."""
    names = [f"{kind}: {name}" for kind, table in tables().items() for name in table]
    return [name for name in names if any(text in name for text in only.split("|"))]


def _evaluate(expression: str, variables: dict[str, Any]) -> Any:
    """An expression's value, eagerly; compiled where there is no kernel."""

    def run() -> Any:
        # As globals: a lambda inside sees no others.
        return eval(expression, NAMESPACE | variables)

    try:
        return run()
    except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError):
        return tf.function(run, jit_compile=True, autograph=False)()


class _Unfit(Exception):
    """A drawn program that cannot run: a shape does not fit, or it gives NaN."""


def make_case(seed: int, name: str) -> Case:
    """A case about one operation, with up to four others around it.

    Args:
        seed: Decides everything.
        name: One of `names()`.
    """
    for attempt in range(60):
        try:
            return _attempt(seed, attempt, name)
        except _Unfit as unfit:
            reason = unfit
    raise ValueError(f"No program found for {name!r} with seed {seed}: {reason!r}")


def _attempt(seed: int, attempt: int, name: str) -> Case:
    draw = Draw(seed * 1000 + attempt)
    kind, _, operation = name.partition(": ")
    ranks, make = tables()[kind][operation]
    if kind == LAYERS:
        # Paths of weights count layers from here, as they do in the script.
        keras.backend.clear_session()
    builder = _Builder(draw, layers=kind == LAYERS)
    builder.begin(draw.choice(ranks))
    for _ in range(draw.choice([0, 0, 1, 2])):
        # What keeps the rank, so that the operation still fits.
        before = len(draw.shape)
        if not builder.apply_any() or len(draw.shape) != before:
            raise _Unfit("prefix")
    builder.annotate(0.7)
    builder.apply(make)
    builder.annotate(0.7)
    for _ in range(draw.choice([0, 0, 1, 2])):
        if len(draw.shape) in (1, 2, 3, 4):
            builder.apply_any()
            builder.annotate(0.4)
    return Case(
        seed=seed,
        name=name,
        axes=draw.axes,
        rules=draw.rules,
        paths=builder.paths(),
        inputs=draw.inputs,
        layers=draw.layers,
        lines=builder.lines,
    )


class _Builder:
    """Adds lines to a program, each tried at once on values."""

    def __init__(self, draw: Draw, layers: bool):
        self.draw = draw
        self.kinds = [kind for kind in tables() if layers or kind != LAYERS]
        self.lines: list[str] = []
        self.variables: dict[str, Any] = {"layers": []}

    def begin(self, rank: int) -> None:
        shape = self.draw.draw_shape(rank)
        self.draw.shape = shape
        name = self.draw.input(shape, annotated=0.0)
        self._run(name)

    def annotate(self, probability: float) -> None:
        draw = self.draw
        if draw.maybe(probability):
            self.lines.append(f"h = {draw.annotation('h', draw.shape)}")

    def paths(self) -> list[tuple[str, tuple]]:
        """Rules for some of the weights."""
        weights = [w for layer in self.variables["layers"] for w in layer.weights]
        return [
            (re.escape(w.path), self.draw.names(len(w.shape)))
            for w in weights
            if len(w.shape) and self.draw.maybe(0.4)
        ]

    def apply_any(self) -> bool:
        """Applies some operation that fits; whether it did."""
        table = tables()[self.draw.choice(self.kinds)]
        ranks, make = table[self.draw.choice(list(table))]
        if len(self.draw.shape) not in ranks:
            return False
        kept = dict(self.draw.inputs), list(self.draw.layers)
        layers = list(self.variables["layers"])
        try:
            self.apply(make)
        except _Unfit:
            self.draw.inputs, self.draw.layers = kept
            self.variables = {
                k: v
                for k, v in self.variables.items()
                if k == "h" or k in self.draw.inputs
            }
            self.variables["layers"] = layers
            return False
        self.annotate(0.4)
        return True

    def apply(self, make: Any) -> None:
        try:
            expression = make(self.draw)
        except IndexError as error:
            raise _Unfit("nothing to choose from") from error
        if expression is None:
            raise _Unfit("does not fit this shape")
        self._run(expression)

    def _run(self, expression: str) -> None:
        variables = self.variables
        for name, text in self.draw.inputs.items():
            if name not in variables:
                variables[name] = tf.constant(eval(text, NAMESPACE, {}))
        for text in self.draw.layers[len(variables["layers"]) :]:
            variables["layers"].append(eval(text, NAMESPACE, {}))
        try:
            value = _evaluate(expression, variables)
            if self.draw.layers:
                # Again, with the weights that the script will give to the layers.
                harness.set_weights(variables["layers"])
                value = _evaluate(expression, variables)
        except (tf.errors.OpError, ValueError, TypeError, IndexError) as error:
            raise _Unfit(f"{expression}: {error}"[:300]) from error
        if isinstance(value, tuple | list) or not tf.is_tensor(value):
            raise _Unfit(f"{expression} is {type(value).__name__}")
        size = int(tf.size(value))
        if size == 0 or size > MOST or value.shape.rank > 5:
            raise _Unfit(f"{expression} has shape {value.shape}")
        lines = [f"h = {expression}"]
        if value.dtype != tf.float32:
            lines.append('h = tf.cast(h, "float32")')
            value = tf.cast(value, "float32")
        largest = float(tf.reduce_max(tf.abs(value)))
        if not np.isfinite(largest):
            raise _Unfit(f"{expression} is not finite")
        if largest > 3.0:
            # Keeps what follows, and the loss, well conditioned.
            lines.append(f"h = h * {2.0 / largest:.3g}")
            value = value * float(f"{2.0 / largest:.3g}")
        self.lines += lines
        variables["h"] = value
        self.draw.shape = tuple(value.shape)
