"""`strategy.describe(model)`: the layout of every weight, and the reason for it."""

import dataclasses
import html
from collections.abc import Callable, Sequence

import keras
import numpy as np

from gshard_tf.layouts.partition_spec import PartitionSpec
from gshard_tf.sharding.mesh import axis_sizes
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.sharding.variable_layouts import WHOLE_SLOT, VariableLayouts

_HEAD = ("weight", "shape", "layout", "bytes/device", "decided by")
# The column of `_HEAD` that is aligned to the right.
_NUMBER = 3


@dataclasses.dataclass(frozen=True)
class VariableSummary:
    """One variable on a mesh.

    Attributes:
        path: Its Keras path.
        shape: Its whole shape.
        layout: Mesh axis, or None, of each dimension; several are joined by "+".
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
        device_type: `"CPU"`, `"GPU"` or `"TPU"`.
    """

    mesh: dict[str, int]
    rows: list[VariableSummary]
    warnings: list[str]
    rewrites: tuple[str, ...] = ()
    device_type: str = "CPU"

    @property
    def bytes(self) -> int:
        """Bytes of all variables."""
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """Bytes that each device holds."""
        return sum(row.bytes_per_device for row in self.rows)

    @property
    def whole(self) -> list[str]:
        """Paths of weights of two and more dimensions that no device holds a part of.

        Slots are not listed: they are as their weights.
        """
        return [
            row.path
            for row in self.rows
            if len(row.shape) > 1 and not any(row.layout) and row.rule != WHOLE_SLOT
        ]

    def __str__(self) -> str:
        body = self._cells()
        widths = [max(map(len, column)) for column in zip(_HEAD, *body, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if i == _NUMBER else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in [_HEAD, *body]
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        lines.append(self._total())
        lines += [f"* {rewrite}" for rewrite in self.rewrites]
        return "\n".join(lines + [f"! {warning}" for warning in self.warnings])

    def _repr_html_(self) -> str:
        """The table, as notebooks show it, in their own colors."""

        def row(cells: Sequence[str], tag: str) -> str:
            return "".join(
                f'<{tag} style="text-align: {"right" if i == _NUMBER else "left"}">'
                f"{html.escape(cell)}</{tag}>"
                for i, cell in enumerate(cells)
            )

        lines = [f"<tr>{row(cells, 'td')}</tr>" for cells in self._cells()]
        notes = [f"<li>{html.escape(text)}</li>" for text in self.rewrites]
        notes += [f"<li><b>{html.escape(text)}</b></li>" for text in self.warnings]
        return (
            '<div style="overflow-x: auto"><table>'
            f"<thead><tr>{row(_HEAD, 'th')}</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table>"
            f"<p>{html.escape(self._total())}</p><ul>{''.join(notes)}</ul></div>"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.path,
                "x".join(map(str, row.shape)) or "scalar",
                ",".join(axis or "-" for axis in row.layout) or "-",
                f"{row.bytes_per_device:,}",
                row.rule,
            )
            for row in self.rows
        ]

    def _total(self) -> str:
        return (
            f"{len(self.rows)} variables on mesh {self.mesh} of {self.device_type} "
            f"devices: {self.bytes:,} bytes, {self.bytes_per_device:,} per device"
        )


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
    # In this order: a variable of Keras 2 that is not the strategy's has no path.
    found = [(owned(v), v.path) for v in variables]
    rows = [summarize_variable(path, value, layouts) for value, path in found]
    return LayoutReport(
        axis_sizes(layouts.mesh),
        rows,
        layouts.warnings(),
        device_type=layouts.mesh.device_type(),
    )


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
        layout=decision.storage.spec,
        bytes=size,
        bytes_per_device=size // shards,
        rule=decision.reason,
    )
