"""Rewrite of scatters whose rows the number of devices does not divide.

Fault: if the rows of a scatter are split over devices that do not divide them, the
partitioner pads the last shard with indices of zero, and adds the padding of the
updates to row 0. Seen with jaxlib 0.9 to 0.12. If the index vectors themselves are
split, results are wrong as well, for any number of rows: with 0.9 and 0.10, not 0.12.

Replacement: index vectors that are whole, and explicit padding to a number of rows that
divides. Its indices are out of bounds, so it has no effect. If a scatter has several
dimensions of rows, padding all of them could multiply its size, so they get a sharding
that divides them instead.
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
    """Makes the rows of every scatter divide; returns the number of rewrites."""

    def replace(editor: Editor, old: Instruction) -> Instruction | None:
        return _even(editor, old, mesh) if old.opcode == "scatter" else None

    return edit_module(module, replace, outside_manual=True)


def _even(editor: Editor, old: Instruction, mesh: MeshAxes) -> Instruction | None:
    numbers = old.scatter_dimension_numbers
    operands = editor.operands(old)
    # The arrays, their common indices, the updates of each.
    count = len(operands) // 2
    indices, updates = operands[count], operands[count + 1 :]
    rank = len(indices.shape.dimensions)
    rows = [d for d in range(rank) if d != numbers.index_vector_dim]
    if _is_split(indices, numbers.index_vector_dim):
        indices = _with_axes(editor, indices, rows, _axes(indices, rows, mesh), mesh)
    elif all(indices.shape.dimensions[d] % mesh.devices == 0 for d in rows):
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
        indices = _with_axes(editor, indices, rows, axes, mesh)
        updates = [_with_axes(editor, u, update_rows, axes, mesh) for u in updates]
    new = editor.copy(old, [*operands[:count], indices, *updates], old.shape)
    new.indices_are_sorted = new.unique_indices = False
    return new


def _is_split(value: Instruction, dimension: int) -> bool:
    """Returns whether an annotation splits a dimension of `value`."""
    tiles = value.sharding.tile_assignment_dimensions
    return dimension < len(value.shape.dimensions) and (
        dimension < len(tiles) and tiles[dimension] > 1
    )


def _padded(
    editor: Editor, value: Instruction, dimension: int, size: int, fill: int
) -> Instruction:
    """Returns `value`, padded to `size` along a dimension."""
    shape = resized(value.shape, dimension, size)
    scalar = editor.constant(fill, value.shape.element_type)
    padded = editor.emit("pad", shape, [value, scalar])
    for d, after in enumerate(shape.dimensions):
        padded.padding_config.dimensions.add(
            edge_padding_high=after - value.shape.dimensions[d]
        )
    return padded


def _axes(indices: Instruction, rows: Sequence[int], mesh: MeshAxes) -> list[list[str]]:
    """Returns the mesh axes that each dimension of rows is split over."""
    axes: list[list[str]] = []
    for dimension in rows:
        taken = [axis for group in axes for axis in group]
        axes.append(mesh.dividing(indices.shape.dimensions[dimension], taken))
    return axes


def _with_axes(
    editor: Editor,
    value: Instruction,
    rows: Sequence[int],
    axes: Sequence[Sequence[str]],
    mesh: MeshAxes,
) -> Instruction:
    over = dict(zip(rows, axes, strict=True))
    rank = len(value.shape.dimensions)
    sharding = mesh.split([over.get(d, []) for d in range(rank)])
    return shardings.with_sharding(editor, value, sharding)
