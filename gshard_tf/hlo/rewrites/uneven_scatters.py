"""Scatters whose rows do not divide by the devices.

The fault: where the rows of a scatter are split over devices that do not divide them,
the partitioner fills the last shard up with indices of zero, and adds what stands
beside them to row 0. Seen with jaxlib 0.9 to 0.12.

Instead: padding of our own, to a number of rows that divides. Its indices are out of
bounds, so it has no effect. Where a scatter has several dimensions of rows, padding all
of them could multiply its size, so they are held on a layout that divides them.
"""

from collections.abc import Sequence

from gshard_tf.compat.xla_protos import HloModuleProto
from gshard_tf.hlo.rewrites import shardings
from gshard_tf.hlo.rewrites.editing import (
    Editor,
    Instruction,
    array_shape,
    edit_module,
    resized,
)
from gshard_tf.hlo.rewrites.shardings import MeshAxes


def make_even(module: HloModuleProto, mesh: MeshAxes) -> int:
    """Makes the rows of every scatter divide; returns how many did not."""

    def replace(editor: Editor, old: Instruction) -> Instruction | None:
        return _even(editor, old, mesh) if old.opcode == "scatter" else None

    return edit_module(module, replace)


def _even(editor: Editor, old: Instruction, mesh: MeshAxes) -> Instruction | None:
    numbers = old.scatter_dimension_numbers
    operands = editor.operands(old)
    # The arrays, their common indices, the updates of each.
    count = len(operands) // 2
    indices, updates = operands[count], operands[count + 1 :]
    rank = len(indices.shape.dimensions)
    rows = [d for d in range(rank) if d != numbers.index_vector_dim]
    if all(indices.shape.dimensions[d] % mesh.devices == 0 for d in rows):
        return None
    if numbers.index_vector_dim == rank:
        # [n] -> [n, 1]: the index vectors are made explicit.
        indices = editor.emit(
            "reshape",
            array_shape(indices.shape.element_type, [*indices.shape.dimensions, 1]),
            [indices],
        )
    update_rank = len(updates[0].shape.dimensions)
    update_rows = [d for d in range(update_rank) if d not in numbers.update_window_dims]
    if len(rows) == 1 and not numbers.scatter_indices_batching_dims:
        size = -(-indices.shape.dimensions[rows[0]] // mesh.devices) * mesh.devices
        indices = _padded(editor, indices, rows[0], size, -1)
        updates = [_padded(editor, u, update_rows[0], size, 0) for u in updates]
    else:
        axes = _axes(indices, rows, mesh)
        indices = _held(editor, indices, rows, axes, mesh)
        updates = [_held(editor, u, update_rows, axes, mesh) for u in updates]
    new = editor.copy(old, [*operands[:count], indices, *updates], old.shape)
    new.indices_are_sorted = new.unique_indices = False
    return new


def _padded(
    editor: Editor, value: Instruction, dimension: int, size: int, filler: int
) -> Instruction:
    """`value`, filled up to `size` along a dimension."""
    shape = resized(value.shape, dimension, size)
    scalar = editor.constant(filler, value.shape.element_type)
    padded = editor.emit("pad", shape, [value, scalar])
    for d, after in enumerate(shape.dimensions):
        padded.padding_config.dimensions.add(
            edge_padding_high=after - value.shape.dimensions[d]
        )
    return padded


def _axes(indices: Instruction, rows: Sequence[int], mesh: MeshAxes) -> list[list[str]]:
    """The mesh axes that each dimension of rows is split over."""
    found: list[list[str]] = []
    for dimension in rows:
        taken = [axis for those in found for axis in those]
        found.append(mesh.that_divide(indices.shape.dimensions[dimension], taken))
    return found


def _held(
    editor: Editor,
    value: Instruction,
    rows: Sequence[int],
    axes: Sequence[Sequence[str]],
    mesh: MeshAxes,
) -> Instruction:
    over = dict(zip(rows, axes, strict=True))
    rank = len(value.shape.dimensions)
    sharding = mesh.split([over.get(d, []) for d in range(rank)])
    return shardings.constrained(editor, value, sharding)
