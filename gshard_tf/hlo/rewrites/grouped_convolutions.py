"""Rewrite of grouped and depthwise convolutions: each device convolves its own rows.

Fault: if the input of a convolution is split over one mesh axis and replicated along
another, the kernel gradient is summed over the replicas too, and so multiplied by the
size of that axis (related to openxla/xla#47945). After a split of the channels the
compiler may abort. Where the result is right, every device gathers the whole batch
first. Seen with jaxlib 0.9 to 0.12.

Replacement: a manual region. The batch is split over the mesh axes that divide it, the
kernel is replicated, and each device convolves its rows. Each device computes the
kernel gradient of its rows, and these are summed outside the region.
"""

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
    """Puts every grouped convolution in a manual region; returns their number."""

    def replace(editor: Editor, old: Instruction) -> Instruction | None:
        if old.opcode != "convolution":
            return None
        if old.batch_group_count > 1:
            return _kernel_gradient(editor, old, mesh)
        if old.feature_group_count > 1:
            return _forward(editor, old, mesh)
        return None

    return edit_module(module, replace, outside_manual=True)


def _forward(editor: Editor, old: Instruction, mesh: MeshAxes) -> Instruction:
    """Emits the convolution itself, or the gradient of its input."""
    numbers = old.convolution_dimension_numbers
    batch, batch_out = numbers.input_batch_dimension, numbers.output_batch_dimension
    images, kernel = editor.operands(old)
    axes = mesh.dividing(images.shape.dimensions[batch])
    rank = len(images.shape.dimensions)
    rows = mesh.split_dimension(axes, rank, batch)
    local = shardings.enter_manual(editor, images, rows, batch)
    whole = shardings.enter_manual(editor, kernel, shardings.replicated(), 0)
    shape = resized(old.shape, batch_out, local.shape.dimensions[batch])
    result = editor.copy(old, [local, whole], shape)
    rows = mesh.split_dimension(axes, rank, batch_out)
    return shardings.leave_manual(editor, result, rows, batch_out)


def _kernel_gradient(editor: Editor, old: Instruction, mesh: MeshAxes) -> Instruction:
    """Emits the gradient of the kernel, which contracts the batch."""
    numbers = old.convolution_dimension_numbers
    # In this convolution, the channels are the batch, in groups, and the images are the
    # features of input and kernel.
    batches = numbers.input_feature_dimension, numbers.kernel_input_feature_dimension
    operands = editor.operands(old)
    axes = mesh.dividing(operands[0].shape.dimensions[batches[0]])
    rank = len(old.shape.dimensions)
    rows = [mesh.split_dimension(axes, rank, batch) for batch in batches]
    local = [
        shardings.enter_manual(editor, *each)
        for each in zip(operands, rows, batches, strict=True)
    ]
    part = editor.copy(old, local, old.shape)
    if not axes:
        return shardings.leave_manual(editor, part, shardings.replicated(), 0)
    # [...] on each device -> [shards, ...] -> [...]
    element_type = old.shape.element_type
    part = editor.emit(
        "reshape", array_shape(element_type, [1, *old.shape.dimensions]), [part]
    )
    shards = mesh.split_dimension(axes, rank + 1, 0)
    return editor.sum_over_first(shardings.leave_manual(editor, part, shards, 0))
