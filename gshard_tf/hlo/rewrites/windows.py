"""Rewrite of windows that move along a split dimension.

Faults: a convolution over an image that is split by height or width is wrong on
many a mesh of several axes, often by the size of an axis. With strides or dilation its
gradients are wrong on meshes of one axis too. The gradient of a maximum over windows
that overlap is wrong on every mesh. Seen with jaxlib 0.9 to 0.12.

Replacement: such an instruction gets a sharding that leaves the dimensions of its
windows whole, at the cost of a gather where they were split; the compiler still decides
on batch and channels. On a mesh of one axis, convolutions without strides and dilation
are right, and stay split.
"""

from collections.abc import Sequence

from gshard_tf.compat.xla_protos import HloModuleProto
from gshard_tf.hlo.rewrites import shardings
from gshard_tf.hlo.rewrites.editing import Editor, Instruction, edit_module
from gshard_tf.hlo.rewrites.shardings import MeshAxes


def keep_whole(module: HloModuleProto, mesh: MeshAxes) -> int:
    """Leaves dimensions under windows whole where needed; returns the rewrites."""
    one_axis = sum(size > 1 for size in mesh.sizes.values()) == 1

    def replace(editor: Editor, old: Instruction) -> Instruction | None:
        if old.opcode == "convolution" and not (
            _is_grouped(old) or (one_axis and _is_plain(old))
        ):
            return _with_whole(editor, old, *_spatial_dimensions(old))
        if old.opcode == "select-and-scatter":
            windows = enumerate(old.window.dimensions)
            overlapping = [d for d, window in windows if window.size > window.stride]
            if overlapping:
                return _with_whole(editor, old, overlapping, overlapping, overlapping)
        return None

    return edit_module(module, replace, outside_manual=True)


def _is_grouped(convolution: Instruction) -> bool:
    # `grouped_convolutions` gives those a manual region.
    return convolution.feature_group_count > 1 or convolution.batch_group_count > 1


def _is_plain(convolution: Instruction) -> bool:
    return all(
        window.stride == window.window_dilation == window.base_dilation == 1
        for window in convolution.window.dimensions
    )


def _spatial_dimensions(convolution: Instruction) -> list[Sequence[int]]:
    """Returns the spatial dimensions of the input, the kernel and the output."""
    numbers = convolution.convolution_dimension_numbers
    return [
        numbers.input_spatial_dimensions,
        numbers.kernel_spatial_dimensions,
        numbers.output_spatial_dimensions,
    ]


def _with_whole(
    editor: Editor,
    old: Instruction,
    of_first: Sequence[int],
    of_second: Sequence[int],
    of_result: Sequence[int],
) -> Instruction:
    """Emits `old` with some dimensions of operands and result left whole."""
    operands = editor.operands(old)
    operands[0] = _whole_along(editor, operands[0], of_first)
    operands[1] = _whole_along(editor, operands[1], of_second)
    return _whole_along(editor, editor.copy(old, operands, old.shape), of_result)


def _whole_along(
    editor: Editor, value: Instruction, dimensions: Sequence[int]
) -> Instruction:
    rank = len(value.shape.dimensions)
    free = [d for d in range(rank) if d not in dimensions]
    return shardings.with_sharding(editor, value, shardings.replicated(), free)
