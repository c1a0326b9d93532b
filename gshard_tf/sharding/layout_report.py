"""`strategy.describe(model)`: where every weight is, and who decided it."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

from gshard_tf.sharding.mesh import axis_sizes
from gshard_tf.sharding.partition_spec import spec_of
from gshard_tf.sharding.sharded_variable import PlacedVariable
from gshard_tf.sharding.variable_layouts import Layouts


@dataclasses.dataclass(frozen=True)
class Row:
    """One variable.

    Attributes:
        path: Its Keras path.
        shape: Its whole shape.
        layout: Mesh axis, or None, of each dimension.
        bytes: Bytes of the whole.
        bytes_per_device: Bytes that each device holds.
        rule: What decided the layout.
    """

    path: str
    shape: tuple[int, ...]
    layout: tuple[str | None, ...]
    bytes: int
    bytes_per_device: int
    rule: str


@dataclasses.dataclass(frozen=True)
class Description:
    """The variables of a model and its optimizer on a mesh; prints as a table."""

    mesh: dict[str, int]
    rows: list[Row]
    complaints: list[str]
    # What the programs so far do for the partitioner's sake, in sentences.
    rewrites: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        return sum(row.bytes_per_device for row in self.rows)

    def __str__(self) -> str:
        head = ("weight", "shape", "layout", "bytes/device", "decided by")
        body = [
            (
                row.path,
                "x".join(map(str, row.shape)) or "scalar",
                ",".join(axis or "-" for axis in row.layout) or "-",
                f"{row.bytes_per_device:,}",
                row.rule,
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if i == 3 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in [head, *body]
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        lines.append(
            f"{len(self.rows)} variables on mesh {self.mesh}: {self.bytes:,} bytes, "
            f"{self.bytes_per_device:,} per device"
        )
        lines += [f"* {rewrite}" for rewrite in self.rewrites]
        return "\n".join(lines + [f"! {complaint}" for complaint in self.complaints])


def describe(
    model: keras.Model,
    layouts: Layouts,
    ours: Callable[[keras.Variable], PlacedVariable],
) -> Description:
    """The description of a built model; see `SpmdStrategy.describe`.

    `ours` gives the strategy's own variable behind a Keras one, or raises.
    """
    if not model.built:
        raise ValueError(
            "describe needs a built model: call it on a batch, `build` it or `fit` it "
            f"first. Received: {model.name!r}, not built"
        )
    variables = list(model.variables)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        variables += optimizer.variables
    rows = [describe_one(v.path, ours(v), layouts) for v in variables]
    mesh = axis_sizes(layouts.mesh)
    return Description(mesh, rows, layouts.complaints())


def describe_one(path: str, value: PlacedVariable, layouts: Layouts) -> Row:
    """The row of one variable."""
    decision = layouts.of(value)
    shape = tuple(value.shape)
    size = int(np.prod(shape)) * value.dtype.size
    shards = int(np.prod([decision.layout.num_shards(d) for d in range(len(shape))]))
    return Row(
        path=path,
        shape=shape,
        layout=spec_of(decision.layout),
        bytes=size,
        bytes_per_device=size // shards,
        rule=decision.rule,
    )
