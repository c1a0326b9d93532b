"""Fourier transforms, each device's rows on their own.

The fault: on CPUs the compiler hands the transform of a split array a layout in memory
that its runtime refuses. Seen with jaxlib 0.9 to 0.12.

Instead: a manual region, whose arrays pass through one dimension on their way in and
out and so have one layout only. The first dimension is split over the mesh axes that
divide it, where it is not transformed; the other axes repeat the work.
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
    """Puts every transform in a manual region; returns how many."""

    def replace(editor: Editor, old: Instruction) -> Instruction | None:
        if old.opcode != "fft":
            return None
        [value] = editor.operands(old)
        rank = len(value.shape.dimensions)
        axes, shape = [], old.shape
        if rank > len(old.fft_length):
            axes = mesh.that_divide(value.shape.dimensions[0])
        rows = mesh.split_dimension(axes, rank, 0)
        local = shardings.enter_manual(editor, value, rows, 0)
        if axes:  # then the first dimension is not transformed
            shape = resized(shape, 0, local.shape.dimensions[0])
        new = editor.copy(old, [_row_major(editor, local)], shape)
        return shardings.leave_manual(editor, _row_major(editor, new), rows, 0)

    return edit_module(module, replace)


def _row_major(editor: Editor, value: Instruction) -> Instruction:
    shape = value.shape
    size = int(np.prod(shape.dimensions))
    flat = editor.emit("reshape", array_shape(shape.element_type, [size]), [value])
    # Without it the two would be simplified away.
    kept = editor.emit("opt-barrier", flat.shape, [flat])
    return editor.emit("reshape", shape, [kept])
