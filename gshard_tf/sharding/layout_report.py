"""`strategy.describe(model)`: the layout of every weight, and the reason for it."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

from gshard_tf.sharding.mesh import axis_sizes
from gshard_tf.sharding.partition_spec import PartitionSpec, spec_of
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.sharding.variable_layouts import VariableLayouts


@dataclasses.dataclass(frozen=True)
class VariableSummary:
    """One variable on a mesh.

    Attributes:
        path: Its Keras path.
        shape: Its whole shape.
        layout: Mesh axis, or None, of each dimension.
        bytes: Bytes of the whole.
        bytes_per_device: Bytes that each device holds.
        rule: The rule that decided the layout.
    """

    path: str
    shape: tuple[int, ...]
    layout: PartitionSpec
    bytes: int
    bytes_per_device: int
    rule: str


@dataclasses.dataclass(frozen=True)
class LayoutReport:
    """The variables of a model and its optimizer on a mesh; prints as a table.

    Attributes:
        mesh: The size of each mesh axis.
        rows: One summary per variable.
        warnings: Likely mistakes, in sentences.
        rewrites: Changes that the latest program needed for the partitioner, in
            sentences.
    """

    mesh: dict[str, int]
    rows: list[VariableSummary]
    warnings: list[str]
    rewrites: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of all variables."""
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """Bytes that each device holds."""
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
        return "\n".join(lines + [f"! {warning}" for warning in self.warnings])


def describe(
    model: keras.Model,
    layouts: VariableLayouts,
    owned: Callable[[keras.Variable], MeshVariableBase],
) -> LayoutReport:
    """Returns the report of a built model; see `SpmdStrategy.describe`.

    Args:
        model: The model.
        layouts: The layouts of the strategy.
        owned: Returns the strategy's own variable behind a Keras one, or raises.

    Raises:
        ValueError: when the model is not built.
    """
    if not model.built:
        raise ValueError(
            "describe needs a built model: call it on a batch, `build` it or `fit` it "
            f"first. Received: {model.name!r}, not built"
        )
    variables = list(model.variables)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        slots = optimizer.variables
        # A method of Keras 2's legacy optimizers.
        variables += slots() if callable(slots) else slots
    rows = [summarize_variable(v.path, owned(v), layouts) for v in variables]
    return LayoutReport(axis_sizes(layouts.mesh), rows, layouts.warnings())


def summarize_variable(
    path: str, value: MeshVariableBase, layouts: VariableLayouts
) -> VariableSummary:
    """Returns the summary of one variable."""
    decision = layouts.layout_for(value)
    shape = tuple(value.shape)
    size = int(np.prod(shape)) * value.dtype.size
    shards = int(np.prod([decision.storage.num_shards(d) for d in range(len(shape))]))
    return VariableSummary(
        path=path,
        shape=shape,
        layout=spec_of(decision.storage),
        bytes=size,
        bytes_per_device=size // shards,
        rule=decision.reason,
    )
