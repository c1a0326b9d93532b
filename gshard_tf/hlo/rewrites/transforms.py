"""Rewrite of Fourier transforms: each device transforms its own rows.

Fault: on CPUs the compiler gives the transform of a split array a memory layout that
its runtime rejects. Seen with jaxlib 0.9 to 0.12.

Replacement: a manual region. Its arrays are reshaped to one dimension and back at both
ends, so they have one layout only. The first dimension, unless it is transformed, is
split over the mesh axes that divide it; the other axes repeat the work.
"""

import numpy as np

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


def keep_local(module: HloModuleProto, mesh: MeshAxes) -> int:
    """Puts every transform in a manual region; returns their number."""

    def replace(editor: Editor, old: Instruction) -> Instruction | None:
        if old.opcode != "fft":
            return None
        [value] = editor.operands(old)
        rank = len(value.shape.dimensions)
        axes: list[str] = []
        shape = old.shape
        if rank > len(old.fft_length):
            axes = mesh.dividing(value.shape.dimensions[0])
        rows = mesh.split_dimension(axes, rank, 0)
        local = shardings.enter_manual(editor, value, rows, 0)
        if axes:  # then the first dimension is not transformed
            shape = resized(shape, 0, local.shape.dimensions[0])
        new = editor.copy(old, [_row_major(editor, local)], shape)
        return shardings.leave_manual(editor, _row_major(editor, new), rows, 0)

    return edit_module(module, replace, outside_manual=True)


def _row_major(editor: Editor, value: Instruction) -> Instruction:
    shape = value.shape
    size = int(np.prod(shape.dimensions))
    flat = editor.emit("reshape", array_shape(shape.element_type, [size]), [value])
    # Without the barrier the two would be simplified away.
    barrier = editor.emit("opt-barrier", flat.shape, [flat])
    return editor.emit("reshape", shape, [barrier])
