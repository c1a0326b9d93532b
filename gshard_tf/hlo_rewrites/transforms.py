"""Fourier transforms, each device's rows on their own.

The fault: on CPUs the compiler hands the transform of a split array a layout in memory
that its runtime refuses. Seen with jaxlib 0.9 to 0.12.

Instead: a manual region, whose arrays pass through one dimension on their way in and
out and so have one layout only. The first dimension is split over the mesh axes that
divide it, where it is not transformed; the other axes repeat the work.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from tensorflow.compiler.xla.service import hlo_pb2

from gshard_tf.hlo_rewrites import shardings
from gshard_tf.hlo_rewrites.editing import (
    Editor,
    Instruction,
    array_shape,
    edit_module,
    resized,
)


def keep_local(
    module: hlo_pb2.HloModuleProto,
    mesh_shape: Mapping[str, int],
    batch_axes: Sequence[str],
) -> int:
    """Puts every transform in a manual region; returns how many.

    Args:
        module: The module.
        mesh_shape: The size of each axis of the mesh, in its order.
        batch_axes: The axes to split the first dimension over first.
    """

    def replace(editor: Editor, old: Instruction) -> Instruction | None:
        if old.opcode != "fft":
            return None
        [value] = editor.operands(old)
        rank = len(value.shape.dimensions)
        axes = []
        if rank > len(old.fft_length):
            rows = value.shape.dimensions[0]
            axes = shardings.axes_that_divide(rows, mesh_shape, batch_axes)
        sharding = shardings.split_dimension(axes, mesh_shape, rank, 0)
        local = shardings.enter_manual(editor, value, sharding, 0)
        shape = old.shape
        if axes:  # then the first dimension is not transformed
            shape = resized(shape, 0, local.shape.dimensions[0])
        new = editor.copy(old, [_row_major(editor, local)], shape)
        return shardings.leave_manual(editor, _row_major(editor, new), sharding, 0)

    return edit_module(module, replace)


def _row_major(editor: Editor, value: Instruction) -> Instruction:
    shape = value.shape
    size = int(np.prod(shape.dimensions))
    flat = editor.emit("reshape", array_shape(shape.element_type, [size]), [value])
    # Without it the two would be simplified away.
    kept = editor.emit("opt-barrier", flat.shape, [flat])
    return editor.emit("reshape", shape, [kept])
