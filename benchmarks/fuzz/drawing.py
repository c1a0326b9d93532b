"""Draws meshes, rules, shapes, annotations and arguments for a random program."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

MESHES = (
    {"a": 2},
    {"a": 3},
    {"a": 4},
    {"a": 8},
    {"a": 2, "b": 2},
    {"a": 2, "b": 3},
    {"a": 3, "b": 2},
    {"a": 2, "b": 4},
    {"a": 4, "b": 2},
    {"a": 1, "b": 4},
    {"a": 2, "b": 2, "c": 2},
)
SIZES = (1, 2, 2, 3, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 11, 12)
LARGEST = 1500  # elements of a tensor


class Draw:
    """The random choices of one case, and what has been drawn so far.

    Attributes:
        shape: Of the tensor `h` that operations are applied to.
        inputs: Name -> expression of its value, in order.
        layers: Expressions of Keras layers.
    """

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.axes: dict[str, int] = self.rng.choice(MESHES)
        names = list(self.axes)
        self.rules: dict[str, str | tuple[str, ...]] = {
            name.upper(): name for name in names if self.maybe(0.85)
        }
        for pair in itertools.permutations(names, 2):
            self.rules["".join(pair).upper()] = pair
        if self.maybe(0.5):
            self.rules["batch"] = self.choice([*names, tuple(names)])
        self.shape: tuple[int, ...] = ()
        self.inputs: dict[str, str] = {}
        self.layers: list[str] = []

    def maybe(self, probability: float = 0.5) -> bool:
        return self.rng.random() < probability

    def choice(self, options: Sequence[Any]) -> Any:
        return self.rng.choice(options)

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return self.rng.randint(low, max(low, high))

    def size(self) -> int:
        return self.choice(SIZES)

    def draw_shape(self, rank: int, limits: Sequence[int] = ()) -> tuple[int, ...]:
        """A shape of few elements; `limits`: the largest size of each dimension."""
        while True:
            shape = tuple(self.size() for _ in range(rank))
            if limits:
                shape = tuple(min(s, m) for s, m in zip(shape, limits, strict=True))
            count = 1
            for size in shape:
                count *= size
            if count <= LARGEST:
                return shape

    # --------------------------------------------------------------- arguments

    def input(self, shape: Sequence[int], annotated: float = 0.3) -> str:
        """A new argument of floating-point numbers, perhaps annotated."""
        name = self._add(f"values({len(self.inputs)}, {tuple(shape)})")
        return self.annotation(name, shape) if self.maybe(annotated) else name

    def ids(self, shape: Sequence[int], high: int) -> str:
        """A new argument of whole numbers below `high`."""
        name = self._add(f"integers({len(self.inputs)}, {tuple(shape)}, {high})")
        return self.annotation(name, shape) if self.maybe(0.3) else name

    def layer(self, text: str) -> str:
        """A new Keras layer that `text` makes, given a name of its own."""
        index = len(self.layers)
        comma = "" if text.endswith("()") else ", "
        self.layers.append(f'keras.layers.{text[:-1]}{comma}name="l{index}")')
        return f"layers[{index}]"

    def _add(self, expression: str) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs[name] = expression
        return name

    # ------------------------------------------------------------- annotations

    def annotation(self, expression: str, shape: Sequence[int]) -> str:
        """`expression`, annotated in one of the ways there are."""
        rank = len(shape)
        devices = 1
        for size in self.axes.values():
            devices *= size
        if rank and self.maybe(0.15):
            parts = self.choice([n for n in range(1, 9) if devices % n == 0])
            dimension = self.number(0, rank - 1)
            return f"split({expression}, {dimension}, {parts})"
        if not rank or self.maybe(0.1):
            return f"replicate({expression})"
        return f"annotate({expression}, {self.names(rank)!r})"

    def names(self, rank: int) -> tuple[str | None, ...]:
        """A logical axis or None per dimension, no mesh axis twice."""
        names: list[str | None] = [None] * rank
        free = [name.upper() for name in self.axes]
        self.rng.shuffle(free)
        for dimension in self.rng.sample(range(rank), rank):
            if free and self.maybe(0.6):
                names[dimension] = free.pop()
                if free and self.maybe(0.25):
                    names[dimension] += free.pop()
        return tuple(names)

    # ------------------------------------------------------------ placeholders

    def fill(self, template: str) -> str:
        """An expression with `{axis}`, `{same}` ... replaced by what is drawn."""
        return template.format_map(_Placeholders(self))


class _Placeholders(dict):
    def __init__(self, draw: Draw):
        super().__init__()
        self.draw = draw

    def __missing__(self, key: str) -> str:
        return str(PLACEHOLDERS[key](self.draw))


def _broadcast(draw: Draw) -> str:
    shape = tuple(1 if draw.maybe(0.4) else size for size in draw.shape)
    return draw.input(shape[draw.number(0, len(shape)) :])


def _axes(draw: Draw) -> tuple[int, ...]:
    rank = len(draw.shape)
    return tuple(sorted(draw.rng.sample(range(rank), draw.number(1, rank))))


def _permutation(draw: Draw) -> tuple[int, ...]:
    return tuple(draw.rng.sample(range(len(draw.shape)), len(draw.shape)))


def _window(draw: Draw) -> tuple[int, ...]:
    return tuple(draw.number(1, 4) for _ in draw.shape[1:-1])


PLACEHOLDERS: dict[str, Callable[[Draw], Any]] = {
    "axis": lambda d: d.number(0, len(d.shape) - 1),
    "axes": _axes,
    "bool": lambda d: d.maybe(),
    "same": lambda d: d.input(d.shape),
    "broadcast": _broadcast,
    "permutation": _permutation,
    "matrix": lambda d: d.input((d.shape[-1], d.size())),
    "vector": lambda d: d.input(d.shape[-1:]),
    "small": lambda d: d.number(1, 3),
    "shift": lambda d: d.number(-4, 4),
    "axis2": lambda d: len(d.shape) - 1,
    "ids": lambda d: d.ids(d.shape, 9),
    "ids0": lambda d: d.ids(d.shape[:1], 9),
    "ids_axis0": lambda d: d.ids((d.size(),), d.shape[0]),
    "ids_last": lambda d: d.ids(d.shape[:-1], d.shape[-1]),
    "first": lambda d: "slice(0, 1)",
    "branch": lambda d: "tf.cast(tf.reduce_sum(h) > 0.0, tf.int32)",
    "whole": lambda d: 'tf.cast(tf.round(h * 9.0) + 20.0, "int32")',
    "gram": lambda d: "(0.2 * h @ tf.transpose(h) + 2.0 * tf.eye(h.shape[0]))",
    "kernel": lambda d: d.input((*_window(d), d.shape[-1], d.number(1, 6))),
    "kernel_back": lambda d: d.input((*_window(d), d.number(1, 6), d.shape[-1])),
    "kernel_depth": lambda d: d.input((*_window(d), d.shape[-1], 1)),
    "kernel_point": lambda d: d.input((1, 1, d.shape[-1], d.number(1, 6))),
    "affine": lambda d: (
        f"tf.constant([[1.0, 0.2, 0.1, 0.0, 0.9, 0.2, 0.0, 0.0]] * {d.shape[0]})"
    ),
    "coordinates": lambda d: f"{d.input((2, d.size()))} + 1.0",
    "units": lambda d: d.number(1, 8),
    "units3": lambda d: d.input((d.shape[0], 3)),
    "groups": lambda d: d.shape[-1],
    "grouped": lambda d: d.shape[-1] * d.number(1, 3),
    # Of values where a function is defined and smooth.
    "positive": lambda d: "(tf.square(h) + 0.3)",
    "unit": lambda d: "(0.9 * tf.tanh(h))",
    "above": lambda d: "(tf.square(h) + 1.2)",
}


class Operations:
    """Operations by name, each with the ranks that it takes."""

    def __init__(self) -> None:
        self.table: dict[str, tuple[tuple[int, ...], Callable[[Draw], str | None]]] = {}

    def add(self, name: str, ranks: Sequence[int] = (1, 2, 3, 4)) -> Callable:
        """Decorates a function from a `Draw` to an expression in `h`, or None."""

        def put(function: Callable[[Draw], str | None]) -> Callable:
            self.table[name] = tuple(ranks), function
            return function

        return put

    def templates(self, text: str, ranks: Sequence[int] = (1, 2, 3, 4)) -> None:
        """Adds one operation per line of templates: the line is its name too."""
        for line in filter(None, map(str.strip, text.splitlines())):
            self.add(line, ranks)(lambda draw, line=line: draw.fill(line))
